//! Places that somebody has while something of his goes on: connections of an address, deliveries of a tenant.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How many places each has who has any.
#[derive(Debug)]
pub(super) struct Places<K: Ord + Clone>(Arc<Mutex<BTreeMap<K, i64>>>);

impl<K: Ord + Clone> Default for Places<K> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<K: Ord + Clone> Places<K> {
    fn taken(&self) -> MutexGuard<'_, BTreeMap<K, i64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `None` for whoever has `most` already.
    pub(super) fn take(&self, who: K, most: i64) -> Option<Place<K>> {
        let mut taken = self.taken();
        if taken.get(&who).is_some_and(|count| *count >= most) {
            return None;
        }
        *taken.entry(who.clone()).or_default() += 1;
        Some(Place { places: Self(self.0.clone()), who })
    }

    pub(super) fn counts(&self) -> BTreeMap<K, i64> {
        self.taken().clone()
    }
}

/// Left when dropped.
#[derive(Debug)]
pub(super) struct Place<K: Ord + Clone> {
    places: Places<K>,
    who: K,
}

impl<K: Ord + Clone> Drop for Place<K> {
    fn drop(&mut self) {
        let mut taken = self.places.taken();
        if let Some(count) = taken.get_mut(&self.who) {
            *count -= 1;
            if *count == 0 {
                taken.remove(&self.who);
            }
        }
    }
}
