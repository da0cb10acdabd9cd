//! Lookup of token ids in a table.

use candle_core::Tensor;

use crate::Result;
use crate::weights::{Error, Source};

/// A table `(v, d)` of one vector per token, dense in the dtype of computation whatever the file stores: lookups are few.
#[derive(Debug, Clone)]
pub struct Embedding {
    table: Tensor,
}

impl Embedding {
    /// The tensor `name` of `v` rows and `d` columns.
    pub fn load(source: &Source, name: &str, v: usize, d: usize) -> Result<Self, Error> {
        Ok(Self { table: source.tensor(name, (v, d))? })
    }

    /// ids `(b, l)` u32 -> `(b, l, d)`. Errors if an id is not in the table.
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let (b, l) = ids.dims2()?;
        let (v, d) = self.table.dims2()?;
        let flat = ids.flatten_all()?;
        // A GPU would read beyond the table without a word.
        if let Some(id) = flat.to_vec1::<u32>()?.into_iter().find(|id| *id as usize >= v) {
            candle_core::bail!("token {id} is not among the model's {v} tokens; the tokenizer belongs to another model");
        }
        self.table.index_select(&flat, 0)?.reshape((b, l, d))
    }

    /// The first `l` rows, `(l, d)`. Errors if there are fewer.
    pub fn first(&self, l: usize) -> Result<Tensor> {
        self.table.narrow(0, 0, l)
    }
}
