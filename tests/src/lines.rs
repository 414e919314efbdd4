//! Lines that a process prints, collected as they come, to be waited for with a deadline.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// All lines of one stream so far; clones share them.
#[derive(Clone, Default)]
pub struct Lines {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    lines: Vec<String>,
    closed: bool,
}

impl Lines {
    /// Collects the lines of `stream` on a thread of their own until it ends (invalid UTF-8 is replaced).
    pub fn of(stream: impl Read + Send + 'static) -> Self {
        let lines = Self::default();
        let writer = lines.clone();
        thread::spawn(move || writer.collect(stream));
        lines
    }

    /// The lines of a stream that nobody collects: none, and at its end.
    pub fn closed() -> Self {
        let lines = Self::default();
        lines.state().closed = true;
        lines
    }

    /// As [`Lines::of`]; each line is also written to `show` before anybody who waits hears of it.
    pub fn of_shown(stream: impl Read + Send + 'static, show: impl Write + Send + 'static) -> Self {
        let lines = Self::default();
        let writer = lines.clone();
        thread::spawn(move || writer.collect(Shown { stream, show }));
        lines
    }

    /// The first answer that `pick` gives for a line, from the first line on; `None` when `timeout` passes or the stream
    /// ends without one.
    pub fn wait_for<T>(&self, timeout: Duration, pick: impl FnMut(&str) -> Option<T>) -> Option<T> {
        self.wait_from(0, timeout, pick)
    }

    /// As [`Lines::wait_for`], from line number `start` (0-based) on.
    pub fn wait_from<T>(&self, start: usize, timeout: Duration, mut pick: impl FnMut(&str) -> Option<T>) -> Option<T> {
        let deadline = Instant::now() + timeout;
        let mut next = start;
        let mut state = self.state();
        loop {
            while next < state.lines.len() {
                if let Some(found) = pick(&state.lines[next]) {
                    return Some(found);
                }
                next += 1;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if state.closed || left.is_zero() {
                return None;
            }
            (state, _) = self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Whether the stream ended within `timeout`.
    pub fn wait_closed(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut state = self.state();
        while !state.closed {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            (state, _) = self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        }
        true
    }

    /// What has been printed up to now.
    pub fn snapshot(&self) -> Vec<String> {
        self.state().lines.clone()
    }

    /// How many lines there are up to now.
    pub fn len(&self) -> usize {
        self.state().lines.len()
    }

    /// Whether nothing was printed yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn collect(&self, stream: impl Read) {
        let mut reader = BufReader::new(stream);
        let mut line = Vec::new();
        while matches!(reader.read_until(b'\n', &mut line), Ok(read) if read > 0) {
            let text = String::from_utf8_lossy(&line).trim_end_matches(['\n', '\r']).to_owned();
            self.state().lines.push(text);
            self.shared.changed.notify_all();
            line.clear();
        }
        self.state().closed = true;
        self.shared.changed.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes what it reads.
struct Shown<R, W> {
    stream: R,
    show: W,
}

impl<R: Read, W: Write> Read for Shown<R, W> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.stream.read(buffer)?;
        self.show.write_all(&buffer[..read])?;
        self.show.flush()?;
        Ok(read)
    }
}

/// Waits until a condition holds that nobody tells of, as that the kernel has freed something; whether it came to hold.
pub fn until(timeout: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + timeout;
    while !condition() {
        if Instant::now() > deadline {
            return false;
        }
        thread::yield_now();
    }
    true
}
