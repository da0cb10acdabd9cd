//! The lines that a worker writes to the service: signs of life, and what makes waiting short. The store has everything that counts.

use std::fmt;
use std::str::FromStr;

use crate::jobs::JobId;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sign {
    /// The model is loaded, on this device.
    Ready(String),
    /// A job runs from here on,
    Begun(JobId),
    /// is a step further (or the worker, idle, has tried a picture),
    Alive,
    /// and has ended.
    Ended(JobId),
}

impl fmt::Display for Sign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ready(device) => write!(f, "ready {device}"),
            Self::Begun(job) => write!(f, "begun {job}"),
            Self::Alive => write!(f, "alive"),
            Self::Ended(job) => write!(f, "ended {job}"),
        }
    }
}

impl FromStr for Sign {
    type Err = ();

    fn from_str(line: &str) -> Result<Self, ()> {
        match line.split_once(' ') {
            Some(("ready", device)) => Ok(Self::Ready(device.into())),
            Some(("begun", job)) => job.parse().map(Self::Begun),
            Some(("ended", job)) => job.parse().map(Self::Ended),
            None if line == "alive" => Ok(Self::Alive),
            _ => Err(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_there_and_back() {
        for sign in [Sign::Ready("cuda:0".into()), Sign::Begun(JobId::new()), Sign::Alive, Sign::Ended(JobId::new())] {
            assert_eq!(sign.to_string().parse(), Ok(sign));
        }
        assert!("begun ../x".parse::<Sign>().is_err() && "warning: something".parse::<Sign>().is_err());
    }
}
