//! An adapter under another program's names.
//!
//! diffusers keeps apart what BFL fuses, so members are cut out of fused modules, which is exact, or fused, which is exact as well: the
//! downs one below the other, each up in its own rows and columns.

use std::collections::BTreeMap;
use std::ops::Range;
use std::str::FromStr;

use candle_core::{DType, Device, Tensor};

use super::adapter::Update;
use super::change::{Factor, Kind, Magnitude};
use super::modules::{DOUBLE_BLOCKS, Module, Place, SINGLE_BLOCKS, flatten};
use super::{Adapter, Error};
use crate::weights::Component;
use crate::weights::names::transformer;

/// Whose names to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// diffusers and PEFT: `transformer.….lora_A.weight`, the scale inside `lora_B`.
    Diffusers,
    /// kohya's sd-scripts: `lora_unet_….lora_down.weight`, `….alpha`.
    Kohya,
    /// ComfyUI: `diffusion_model.….lora_down.weight`, `….alpha`.
    Comfy,
}

impl FromStr for Format {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        Ok(match text {
            "diffusers" => Self::Diffusers,
            "kohya" => Self::Kohya,
            "comfy" => Self::Comfy,
            _ => return Err(()),
        })
    }
}

/// The tensors of `adapter` by their names in `format`, in `dtype` or as they were stored. An error names every module that `format`
/// cannot say.
pub fn convert(adapter: &Adapter, format: Format, dtype: Option<DType>) -> Result<BTreeMap<String, Tensor>, Error> {
    let mut modules: BTreeMap<(Component, &str), Vec<&Update>> = BTreeMap::new();
    for update in &adapter.updates {
        modules.entry((update.module.component, &update.module.name)).or_default().push(update);
    }
    let mut writer = Writer { format, dtype, tensors: BTreeMap::new(), unsaid: Vec::new() };
    for updates in modules.values() {
        writer.module(updates)?;
    }
    if writer.unsaid.is_empty() {
        return Ok(writer.tensors);
    }
    let what = format!("changes that {format:?}'s names cannot say").to_lowercase();
    Err(Error::Unsupported { what, keys: writer.unsaid })
}

struct Writer {
    format: Format,
    dtype: Option<DType>,
    tensors: BTreeMap<String, Tensor>,
    unsaid: Vec<String>,
}

/// One low-rank change in f32 with its factor inside `up`, and the rows of the canonical tensor that it covers.
struct Piece {
    up: Tensor,
    down: Tensor,
    rows: Range<usize>,
    dtype: DType,
}

impl Writer {
    /// All changes of one canonical module.
    fn module(&mut self, updates: &[&Update]) -> Result<(), Error> {
        let [first, ..] = updates else { return Ok(()) };
        let (component, name) = (first.module.component, first.module.name.as_str());
        if self.format == Format::Diffusers {
            return match pieces(updates)? {
                Some(pieces) => self.members(component, name, &pieces),
                None => self.cannot(updates),
            };
        }
        let stem = match (self.format, component) {
            (Format::Kohya, Component::Transformer) => format!("lora_unet_{}", flatten(name)),
            (Format::Kohya, Component::Clip) => format!("lora_te1_text_model_{}", flatten(name)),
            (Format::Kohya, _) => format!("lora_te3_{}", flatten(name)),
            (_, Component::Transformer) => format!("diffusion_model.{name}"),
            (_, Component::Clip) => format!("text_encoders.clip_l.transformer.text_model.{name}"),
            (_, _) => format!("text_encoders.t5xxl.transformer.{name}"),
        };
        if updates.iter().all(|update| update.module.place == Place::Whole) {
            return updates.iter().try_for_each(|update| self.whole(&stem, update));
        }
        match pieces(updates)? {
            Some(pieces) => self.fused(&stem, name, &pieces),
            // Only low-rank changes can be fused. LyCORIS' names know the members as well.
            None => updates.iter().try_for_each(|update| match (member(&update.module), self.format) {
                (None, _) => self.cannot(&[update]),
                (Some(member), Format::Kohya) => self.whole(&format!("lycoris_{}", flatten(&member)), update),
                (Some(member), _) => self.whole(&format!("transformer.{member}"), update),
            }),
        }
    }

    fn cannot(&mut self, updates: &[&Update]) -> Result<(), Error> {
        self.unsaid.extend(updates.iter().map(|update| format!("{} ({})", update.module, update.change.kind.name())));
        Ok(())
    }

    /// A change of a whole module, tensor by tensor as LyCORIS and ComfyUI call them.
    fn whole(&mut self, stem: &str, update: &Update) -> Result<(), Error> {
        let Update { change, bias, module } = update;
        let mut alpha = None;
        let factor = |side: &Factor, name: &str| -> Vec<(String, Tensor)> {
            match side {
                Factor::Whole(whole) => vec![(name.to_owned(), whole.clone())],
                Factor::Product(up, down) => vec![(format!("{name}_a"), up.clone()), (format!("{name}_b"), down.clone())],
            }
        };
        let rank = |side: &Factor| match side {
            Factor::Whole(_) => None,
            Factor::Product(_, down) => down.dim(0).ok(),
        };
        let tensors: Vec<(String, Tensor)> = match &change.kind {
            Kind::LowRank { up, down } if !bias => {
                alpha = Some(change.factor * down.dim(0)? as f64);
                vec![("lora_up.weight".into(), up.clone()), ("lora_down.weight".into(), down.clone())]
            }
            Kind::Hadamard { first, second } if !bias => {
                alpha = rank(first).map(|rank| change.factor * rank as f64);
                [factor(first, "hada_w1"), factor(second, "hada_w2")].concat()
            }
            Kind::Kronecker { left, right } if !bias => {
                alpha = rank(right).or(rank(left)).map(|rank| change.factor * rank as f64);
                [factor(left, "lokr_w1"), factor(right, "lokr_w2")].concat()
            }
            Kind::Difference(delta) => {
                let delta = if change.factor == 1.0 { delta.clone() } else { (delta.to_dtype(DType::F32)? * change.factor)? };
                vec![(if *bias { "diff_b" } else { "diff" }.into(), delta)]
            }
            Kind::Replacement(value) if !bias && self.format == Format::Comfy => vec![("set_weight".into(), value.clone())],
            _ => return self.cannot(&[update]),
        };
        // Only a factor of 1 needs no word.
        if alpha.is_none() && change.factor != 1.0 && !matches!(change.kind, Kind::Difference(_)) {
            return self.cannot(&[update]);
        }
        // ComfyUI calls a norm's change by the whole name of the tensor.
        let scale = self.format == Format::Comfy && module.is_norm() && module.component == Component::Transformer && !bias;
        for (name, tensor) in tensors {
            self.put(if scale { format!("{stem}.scale.{name}") } else { format!("{stem}.{name}") }, &tensor, None)?;
        }
        match &change.magnitude {
            Some(Magnitude::Output(m) | Magnitude::Input(m)) => self.put(format!("{stem}.dora_scale"), m, None)?,
            None => {}
        }
        if let Some(alpha) = alpha {
            let alpha = Tensor::new(alpha as f32, &Device::Cpu)?;
            self.tensors.insert(format!("{stem}.alpha"), alpha);
        }
        Ok(())
    }

    /// Members in one module.
    fn fused(&mut self, stem: &str, name: &str, pieces: &[Piece]) -> Result<(), Error> {
        let d = pieces[0].down.dim(1)?;
        let output = match name {
            name if name.ends_with(".qkv") => 3 * d,
            // FLUX.1's single blocks: query, key, value and a hidden layer of 4 d.
            name if name.ends_with(".linear1") => pieces.iter().map(|piece| piece.rows.end).max().unwrap_or(0).max(7 * d),
            _ => pieces[0].rows.end,
        };
        let dtype = pieces[0].dtype;
        // Members that were cut out of one module share their down.
        let shared = pieces.iter().all(|piece| equal(&piece.down, &pieces[0].down)) && disjoint(pieces);
        let columns: usize = if shared { pieces[0].down.dim(0)? } else { pieces.iter().map(|p| p.down.dims()[0]).sum() };
        let (mut at, mut sides) = (0, Vec::new());
        for piece in pieces {
            let rank = piece.down.dim(0)?;
            let left = if shared { 0 } else { at };
            let wide = piece.up.pad_with_zeros(1, left, columns - left - rank)?;
            sides.push(wide.pad_with_zeros(0, piece.rows.start, output - piece.rows.end)?);
            at += rank;
        }
        let up = sides.iter().skip(1).try_fold(sides[0].clone(), |sum, side| sum + side)?;
        let downs: Vec<&Tensor> = pieces.iter().take(if shared { 1 } else { pieces.len() }).map(|piece| &piece.down).collect();
        self.put(format!("{stem}.lora_up.weight"), &up, Some(dtype))?;
        self.put(format!("{stem}.lora_down.weight"), &Tensor::cat(&downs, 0)?, Some(dtype))?;
        self.tensors.insert(format!("{stem}.alpha"), Tensor::new(columns as f32, &Device::Cpu)?);
        Ok(())
    }

    /// One module as diffusers has it: each member by itself.
    fn members(&mut self, component: Component, name: &str, pieces: &[Piece]) -> Result<(), Error> {
        let d = pieces[0].down.dim(1)?;
        let members: Vec<(String, Range<usize>, bool)> = match component {
            Component::Transformer => transformer::modules(DOUBLE_BLOCKS, SINGLE_BLOCKS)
                .into_iter()
                .filter(|module| module.bfl == name)
                .map(|module| {
                    let rows = Place::of(&module).rows(usize::MAX, d);
                    (format!("transformer.{}", module.diffusers), rows, module.swap_halves)
                })
                .collect(),
            Component::Clip => vec![(format!("text_encoder.text_model.{name}"), 0..usize::MAX, false)],
            _ => vec![(format!("text_encoder_2.{name}"), 0..usize::MAX, false)],
        };
        for (stem, rows, swapped) in members {
            let mut found = Vec::new();
            for piece in pieces {
                let (start, end) = (rows.start.max(piece.rows.start), rows.end.min(piece.rows.end));
                if start >= end {
                    continue;
                }
                let up = piece.up.narrow(0, start - piece.rows.start, end - start)?;
                found.push((if swapped { super::change::swap_halves(&up)? } else { up }, piece));
            }
            let Some((_, first)) = found.first() else { continue };
            let dtype = Some(first.dtype);
            let ups: Vec<&Tensor> = found.iter().map(|(up, _)| up).collect();
            let downs: Vec<&Tensor> = found.iter().map(|(_, piece)| &piece.down).collect();
            self.put(format!("{stem}.lora_A.weight"), &Tensor::cat(&downs, 0)?, dtype)?;
            self.put(format!("{stem}.lora_B.weight"), &Tensor::cat(&ups, 1)?, dtype)?;
        }
        Ok(())
    }

    /// In the wanted type, else in `stored`, else as it is.
    fn put(&mut self, name: String, tensor: &Tensor, stored: Option<DType>) -> Result<(), Error> {
        let dtype = self.dtype.or(stored).unwrap_or_else(|| tensor.dtype());
        // fp8 was only a way to keep it.
        let dtype = if matches!(dtype, DType::F32 | DType::F16 | DType::BF16) { dtype } else { DType::BF16 };
        self.tensors.insert(name, tensor.to_dtype(dtype)?.contiguous()?);
        Ok(())
    }
}

/// What diffusers calls a module that is a part of BFL's.
fn member(of: &Module) -> Option<String> {
    let mut modules = transformer::modules(DOUBLE_BLOCKS, SINGLE_BLOCKS).into_iter();
    modules.find(|module| module.bfl == of.name && Place::of(module) == of.place).map(|module| module.diffusers)
}

/// The changes as plain low-rank ones, or `None` if one of them is something else.
fn pieces(updates: &[&Update]) -> Result<Option<Vec<Piece>>, Error> {
    let mut pieces = Vec::new();
    for Update { module, bias, change } in updates {
        let (Kind::LowRank { up, down }, None, false) = (&change.kind, &change.magnitude, *bias) else { return Ok(None) };
        let dtype = up.dtype();
        let (up, down) = ((up.to_dtype(DType::F32)? * change.factor)?, down.to_dtype(DType::F32)?);
        let rows = span(module, up.dim(0)?, down.dim(1)?);
        let up = if module.place == Place::SwappedHalves { super::change::swap_halves(&up)? } else { up };
        pieces.push(Piece { up, down, rows, dtype });
    }
    Ok(Some(pieces))
}

/// The rows of the canonical tensor that a change with so many rows covers.
fn span(module: &Module, rows: usize, d: usize) -> Range<usize> {
    let start = module.place.rows(usize::MAX, d).start;
    start..start + rows
}

fn disjoint(pieces: &[Piece]) -> bool {
    let apart =
        |(i, a): (usize, &Piece)| pieces[i + 1..].iter().all(|b| a.rows.end <= b.rows.start || b.rows.end <= a.rows.start);
    pieces.iter().enumerate().all(apart)
}

fn equal(a: &Tensor, b: &Tensor) -> bool {
    let values = |x: &Tensor| x.flatten_all().and_then(|x| x.to_vec1::<f32>()).ok();
    a.dims() == b.dims() && values(a) == values(b)
}
