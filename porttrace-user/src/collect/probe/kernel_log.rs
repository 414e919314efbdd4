//! The kernel side's own log lines (aya-log), off unless asked for.

use super::config::ProbeError;
use super::object::chain;
use super::sys;
use aya_log::EbpfLogger;
use log::{Log, Metadata, Record};
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, PoisonError};

/// Reads the lines when asked; nothing happens in between.
pub struct KernelLog {
    logger: EbpfLogger<Lines>,
    lines: Lines,
}

#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<String>>>);

impl KernelLog {
    /// That of a loaded program, and of all others of the same object.
    pub fn of(program: BorrowedFd<'_>) -> Result<Self, ProbeError> {
        let failed = |why| ProbeError::Load { what: "the kernel side's log".into(), why };
        let lines = Lines::default();
        let id = sys::program_id(program).map_err(|error| failed(error.to_string()))?;
        let logger = EbpfLogger::init_from_id_with_logger(id, lines.clone()).map_err(|error| failed(chain(&error)))?;
        Ok(Self { logger, lines })
    }

    /// The lines since the last call.
    pub fn take(&mut self) -> Vec<String> {
        self.logger.flush();
        std::mem::take(&mut *self.lines.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Log for Lines {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let line = format!("{} {}: {}", record.level().as_str().to_lowercase(), record.target(), record.args());
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(line);
    }

    fn flush(&self) {}
}
