//! Pictures of people to compare with, and what reads them.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::metrics::Judge;
use super::results::Results;
use crate::ops::{Error, files};

const FILE: &str = "references.json";

/// Folders of pictures: of the person, and of others.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct References {
    pub identity: Option<PathBuf>,
    #[serde(default)]
    pub others: Vec<PathBuf>,
}

impl References {
    pub(super) fn is_empty(&self) -> bool {
        self.identity.is_none() && self.others.is_empty()
    }

    /// An error for folders that are none.
    pub(super) fn check(&self) -> Result<(), Error> {
        let named =
            self.identity.iter().map(|folder| ("identity", folder)).chain(self.others.iter().map(|folder| ("others", folder)));
        for (field, folder) in named {
            if !folder.is_dir() {
                return Err(Error::invalid(field, &folder.display(), "a folder of pictures"));
            }
        }
        Ok(())
    }

    /// Those that the run's last report used.
    pub(super) fn kept(run: &Path) -> Self {
        std::fs::read(run.join(FILE)).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default()
    }

    pub(super) fn keep(&self, run: &Path) -> Result<(), Error> {
        files::write(&run.join(FILE), true, &serde_json::to_vec(self).expect("paths"))
    }

    /// Whatever can read the pictures of this run.
    pub(super) fn judges(&self, _results: &Results) -> Result<Vec<Box<dyn Judge>>, Error> {
        Ok(Vec::new())
    }
}
