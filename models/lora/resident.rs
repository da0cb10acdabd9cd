//! Adapters that stay on the device, so that coming back to a person sends nothing.

use std::sync::Arc;

use candle_core::{Device, Result};

use super::Adapter;

/// Adapters on one device, the last one used first.
#[derive(Debug, Default)]
pub(super) struct Resident {
    adapters: Vec<(Arc<Adapter>, u64)>,
}

impl Resident {
    /// The adapters of a set on `device`: there already, or sent now. Others make room for them, those first that were used longest ago;
    /// what is beyond `most` bytes of the set itself is returned as it came.
    pub(super) fn get(&mut self, set: &[Arc<Adapter>], device: &Device, most: u64) -> Result<Vec<Arc<Adapter>>> {
        let (mut used, mut total) = (Vec::new(), 0);
        for adapter in set {
            let (id, bytes) = (adapter.identity(), adapter.bytes()?);
            if !used.contains(&id) && total + bytes <= most {
                total += bytes;
                used.push(id);
            }
        }
        // What has to go goes first, so that old and new are never there at once.
        self.adapters.sort_by_key(|(known, _)| !used.contains(&known.identity()));
        let held = |adapters: &[(Arc<Adapter>, u64)]| -> u64 {
            adapters.iter().filter(|(known, _)| !used.contains(&known.identity())).map(|(_, bytes)| bytes).sum()
        };
        while held(&self.adapters) + total > most {
            self.adapters.pop();
        }
        let mut one = |adapter: &Arc<Adapter>| -> Result<Arc<Adapter>> {
            if !used.contains(&adapter.identity()) {
                return Ok(adapter.clone());
            }
            if let Some((known, _)) = self.adapters.iter().find(|(known, _)| known.identity() == adapter.identity()) {
                return Ok(known.clone());
            }
            let sent = Arc::new(adapter.to_device(device)?);
            self.adapters.insert(0, (sent.clone(), adapter.bytes()?));
            Ok(sent)
        };
        set.iter().map(&mut one).collect()
    }

    /// Gives the memory back.
    pub(super) fn forget(&mut self) {
        self.adapters.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn adapter(name: &str) -> Arc<Adapter> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/lora").join(name);
        Arc::new(Adapter::open(&path).unwrap())
    }

    fn bytes(adapter: &Adapter) -> u64 {
        adapter.bytes().unwrap()
    }

    #[test]
    fn those_used_last_stay() {
        let names = ["kohya.safetensors", "diffusers.safetensors", "lokr.safetensors"];
        let mut adapters = names.map(adapter);
        adapters.sort_by_key(|adapter| bytes(adapter));
        let [a, b, c] = adapters;
        let room = bytes(&a) + bytes(&c);
        let mut resident = Resident::default();
        let mut get = |set: &[&Arc<Adapter>], most| {
            let set: Vec<_> = set.iter().map(|adapter| (*adapter).clone()).collect();
            resident.get(&set, &Device::Cpu, most).unwrap()
        };
        let first = get(&[&a], room).remove(0);
        assert!(!Arc::ptr_eq(&first, &a), "it is a copy of its own");
        let second = get(&[&b], room).remove(0);
        assert!(Arc::ptr_eq(&get(&[&a], room)[0], &first));
        // The third takes the place of the second, which was used before the first.
        get(&[&c], room);
        assert!(Arc::ptr_eq(&get(&[&a], room)[0], &first));
        assert!(!Arc::ptr_eq(&get(&[&b], room)[0], &second));
        // Of a set that is too large, what fits is there and the rest stays where it is; twice the same is there once.
        let set = get(&[&a, &b, &a], bytes(&a));
        assert!(Arc::ptr_eq(&set[0], &first) && Arc::ptr_eq(&set[1], &b) && Arc::ptr_eq(&set[2], &first));
        // What is too large by itself drives nothing out.
        assert!(Arc::ptr_eq(&get(&[&c], bytes(&c) - 1)[0], &c));
        assert!(Arc::ptr_eq(&get(&[&a], room)[0], &first));
        resident.forget();
        assert!(!Arc::ptr_eq(&resident.get(std::slice::from_ref(&a), &Device::Cpu, room).unwrap()[0], &first));
    }
}
