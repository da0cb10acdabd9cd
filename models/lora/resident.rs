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
    /// The adapter on `device`: one that is there already, or sent now. It is kept until `most` bytes are reached by others; one that is
    /// larger is returned as it came.
    pub(super) fn get(&mut self, adapter: &Arc<Adapter>, device: &Device, most: u64) -> Result<Arc<Adapter>> {
        let bytes = adapter.bytes()?;
        if bytes > most {
            return Ok(adapter.clone());
        }
        let known = self.adapters.iter().position(|(known, _)| known.digest() == adapter.digest());
        let found = match known {
            Some(at) => self.adapters.remove(at).0,
            None => {
                // What has to go goes first, so that both are never there at once.
                while self.adapters.iter().map(|(_, bytes)| bytes).sum::<u64>() + bytes > most {
                    self.adapters.pop();
                }
                Arc::new(adapter.to_device(device)?)
            }
        };
        self.adapters.insert(0, (found.clone(), bytes));
        Ok(found)
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
        let [a, b, c] = names.map(adapter);
        let mut resident = Resident::default();
        let mut get = |adapter: &Arc<Adapter>, most| resident.get(adapter, &Device::Cpu, most).unwrap();
        let room = bytes(&a) + bytes(&b).max(bytes(&c));
        let first = get(&a, room);
        assert!(!Arc::ptr_eq(&first, &a), "it is a copy of its own");
        let second = get(&b, room);
        assert!(Arc::ptr_eq(&get(&a, room), &first));
        // The third takes the place of the second, which was used before the first.
        get(&c, room);
        assert!(Arc::ptr_eq(&get(&a, room), &first));
        assert!(!Arc::ptr_eq(&get(&b, room), &second));
        // What is too large by itself is not kept, and drives nothing out.
        assert!(Arc::ptr_eq(&get(&c, bytes(&c) - 1), &c));
        resident.forget();
        assert!(!Arc::ptr_eq(&resident.get(&a, &Device::Cpu, room).unwrap(), &first));
    }
}
