//! What kernels learned about a card, in files of our cache.

use std::path::{Path, PathBuf};
use std::sync::Once;

use crate::replace::replace;

/// One small file for each name, in a folder that may be deleted at any time.
#[derive(Debug, Clone)]
pub struct Kept(PathBuf);

impl Kept {
    #[must_use]
    pub fn in_folder(folder: &Path) -> Self {
        Self(folder.to_owned())
    }

    fn put(&self, name: &str, text: &str) -> std::io::Result<()> {
        replace(&self.0.join(name), text.as_bytes())
    }
}

impl kernels::Keeper for Kept {
    fn read(&self, name: &str) -> Option<String> {
        std::fs::read_to_string(self.0.join(name)).ok()
    }

    fn write(&self, name: &str, text: &str) {
        // Once: a service would say it with every picture.
        static SAID: Once = Once::new();
        if let Err(error) = self.put(name, text) {
            SAID.call_once(|| tracing::warn!("what was timed on this card cannot be kept in {}: {error}", self.0.display()));
        }
    }
}

#[cfg(test)]
mod tests {
    use kernels::Keeper;

    use super::*;

    #[test]
    fn texts_are_kept_and_a_folder_that_cannot_be_written_costs_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let kept = Kept::in_folder(&folder.path().join("new"));
        assert_eq!(kept.read("a.txt"), None);
        kept.write("a.txt", "one");
        kept.write("a.txt", "two");
        assert_eq!(kept.read("a.txt").as_deref(), Some("two"));
        let file = folder.path().join("file");
        std::fs::write(&file, "").unwrap();
        let nowhere = Kept::in_folder(&file);
        nowhere.write("a.txt", "one");
        assert_eq!(nowhere.read("a.txt"), None);
    }
}
