//! What happened beside the connections.

/// A sentence for people.
pub struct Note {
    pub text: String,
    pub warns: bool,
}

impl Note {
    pub const fn of(text: String) -> Self {
        Self { text, warns: false }
    }

    pub const fn warning(text: String) -> Self {
        Self { text, warns: true }
    }
}
