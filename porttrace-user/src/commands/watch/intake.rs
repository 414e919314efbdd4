//! From the ring buffer to the correlator, also while something else takes its time.

use porttrace_user::collect::probe::Probe;
use porttrace_user::core::correlate::Correlator;
use porttrace_user::core::model::event::Event;

/// What `reading` gives. Events are taken meanwhile and counted in `taken`: many rules take a while to read, and the ring buffer
/// does not hold all that comes in a second.
pub async fn while_reading<T>(
    reading: impl Future<Output = T>,
    probe: &mut Probe,
    correlator: &mut Correlator,
    taken: &mut u64,
) -> anyhow::Result<T> {
    tokio::pin!(reading);
    let mut events = Vec::new();
    loop {
        tokio::select! {
            read = &mut reading => return Ok(read),
            count = probe.read(&mut events) => {
                *taken += count? as u64;
                push_all(correlator, &mut events);
            }
        }
    }
}

/// Events of one CPU come in order, those of several interleaved: a batch is sorted by time first.
pub fn push_all(correlator: &mut Correlator, events: &mut Vec<Event>) {
    events.sort_by_key(|event| event.time_ns);
    events.drain(..).for_each(|event| correlator.push(event));
}
