//! `--expect OUTCOME`.

use porttrace_user::core::model::trace::{Fraction, Trace};
use porttrace_user::render::trace::words::Outcome;
use std::fmt;
use std::str::FromStr;

/// What a simulation must end in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expectation {
    wanted: Wanted,
    /// One branch is enough; otherwise all must.
    any: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    One(Outcome),
    /// Delivered or forwarded.
    Accepted,
}

const OUTCOMES: [Outcome; 5] =
    [Outcome::Delivered, Outcome::Forwarded, Outcome::Rejected, Outcome::Dropped, Outcome::Unknown];

impl Expectation {
    /// Branches that never happen (probability 0) do not count; no branch at all is never as expected.
    pub fn holds(self, trace: &Trace) -> bool {
        let possible = trace.branches.iter().filter(|branch| branch.probability != Fraction::new(0, 1));
        let mut agree = possible.map(|branch| self.agrees(Outcome::of(&branch.verdict))).peekable();
        if self.any { agree.any(|yes| yes) } else { agree.peek().is_some() && agree.all(|yes| yes) }
    }

    fn agrees(self, outcome: Outcome) -> bool {
        match self.wanted {
            Wanted::One(wanted) => outcome == wanted,
            Wanted::Accepted => matches!(outcome, Outcome::Delivered | Outcome::Forwarded),
        }
    }
}

impl FromStr for Expectation {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (any, name) = text.strip_prefix("any:").map_or((false, text), |name| (true, name));
        let wanted = match OUTCOMES.into_iter().find(|outcome| outcome.name() == name) {
            Some(outcome) => Wanted::One(outcome),
            None if name == "accepted" => Wanted::Accepted,
            None => {
                return Err(
                    "say delivered, forwarded, accepted, rejected, dropped or unknown, with any: before it if one \
                            branch is enough"
                        .to_owned(),
                );
            }
        };
        Ok(Self { wanted, any })
    }
}

impl fmt::Display for Expectation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.wanted {
            Wanted::One(outcome) => outcome.name(),
            Wanted::Accepted => "accepted",
        };
        write!(f, "{name} in {}", if self.any { "a branch" } else { "all branches" })
    }
}
