//! From the fused projection of each stream to the queries, keys and values of one joint attention.

use candle_core::{D, DType, IndexOp, Result, Tensor, bail};
use rayon::prelude::*;

use super::attention::attention;
use super::norm::{rms_norm, root_mean_square};
use super::{cpu, rotary::rotate};
use crate::launch::{Launch, Pointer, applies, launch, output, suffix};

/// The projection of one stream of tokens, and the norms of its heads.
#[derive(Debug, Clone)]
pub struct Projection<'a> {
    /// `(b, l, 3 d)`: all heads of q, then of k, then of v. It may be a view.
    pub qkv: &'a Tensor,
    /// `(e)` f32.
    pub query_scale: Tensor,
    /// `(e)` f32.
    pub key_scale: Tensor,
}

/// Queries, keys and values, each `(b, h, l, e)`.
#[derive(Debug, Clone)]
pub struct Heads {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
}

impl Heads {
    /// [`attention`] of these tokens -> `(b, l, h e)`.
    pub fn attend(&self) -> Result<Tensor> {
        attention(&self.q, &self.k, &self.v, self.scale()?, None)?.transpose(1, 2)?.flatten_from(2)
    }

    /// Of the scores: 1 / √e.
    pub(super) fn scale(&self) -> Result<f64> {
        Ok(1. / (self.q.dim(D::Minus1)? as f64).sqrt())
    }
}

/// Splits every stream's projection into heads, normalises (root mean square, `eps`) and rotates q and k, and puts the streams'
/// tokens one after the other. cos and sin are `(l, e/2)` f32 for the `l` tokens of all streams.
///
/// Fused on the CPU: composed, the same takes seven passes and as many copies. Errors if the shapes do not fit.
pub fn joint_heads(streams: &[Projection<'_>], heads: usize, cos: &Tensor, sin: &Tensor, eps: f32) -> Result<Heads> {
    let Some(first) = streams.first() else { bail!("attention over no stream") };
    if let Some(heads) = by_kernel(streams, heads, cos, sin, eps)? {
        return Ok(heads);
    }
    if first.qkv.device().is_cpu() { fused(streams, heads, cos, sin, eps) } else { composed(streams, heads, cos, sin, eps) }
}

fn composed(streams: &[Projection<'_>], heads: usize, cos: &Tensor, sin: &Tensor, eps: f32) -> Result<Heads> {
    let part = |index: usize, norm: &dyn Fn(&Projection<'_>, Tensor) -> Result<Tensor>| {
        let of = |stream: &Projection<'_>| {
            let (b, l, width) = stream.qkv.dims3()?;
            let split = stream.qkv.reshape((b, l, 3, heads, width / (3 * heads)))?;
            norm(stream, split.i((.., .., index))?.transpose(1, 2)?.contiguous()?) // (b, h, l, e)
        };
        Tensor::cat(&streams.iter().map(of).collect::<Result<Vec<_>>>()?, D::Minus2)
    };
    let q = part(0, &|stream, q| rms_norm(&q, &stream.query_scale, eps))?;
    let k = part(1, &|stream, k| rms_norm(&k, &stream.key_scale, eps))?;
    Ok(Heads { q: rotate(&q, cos, sin)?, k: rotate(&k, cos, sin)?, v: part(2, &|_, v| Ok(v))? })
}

fn fused(streams: &[Projection<'_>], heads: usize, cos: &Tensor, sin: &Tensor, eps: f32) -> Result<Heads> {
    let (b, _, width) = streams[0].qkv.dims3()?;
    let e = width / (3 * heads);
    let l = streams.iter().map(|stream| stream.qkv.dim(1)).sum::<Result<usize>>()?;
    let dtype = streams[0].qkv.dtype();
    let scaled = |stream: &Projection<'_>| [&stream.query_scale, &stream.key_scale].iter().all(|scale| scale.dims() == [e]);
    if cos.dims() != [l, e / 2] || sin.dims() != [l, e / 2] || !streams.iter().all(scaled) {
        bail!("rotation of {l} tokens with {e} channels a head by {:?}", cos.shape());
    }
    let mut parts = [vec![0f32; b * heads * l * e], vec![0f32; b * heads * l * e], vec![0f32; b * heads * l * e]];
    cpu::read(cos, |cos| {
        cpu::read(sin, |sin| {
            let mut before = 0;
            for stream in streams {
                let (items, tokens, stream_width) = stream.qkv.dims3()?;
                if (items, stream_width) != (b, width) {
                    bail!("streams of {:?} and {:?} side by side", streams[0].qkv.shape(), stream.qkv.shape());
                }
                // Row by row as it lies: the single block's projection is a view into a wider matrix.
                let wide = stream.qkv.to_dtype(DType::F32)?;
                let scales = [stream.query_scale.to_vec1::<f32>()?, stream.key_scale.to_vec1::<f32>()?];
                let turn = Turn { scales: &scales, cos: &cos[before * e / 2..], sin: &sin[before * e / 2..], e, eps };
                cpu::read_rows(&wide, |row| {
                    let [q, k, v] = &mut parts;
                    let whole = l * e;
                    let outputs = q.par_chunks_mut(whole).zip(k.par_chunks_mut(whole)).zip(v.par_chunks_mut(whole));
                    outputs.enumerate().for_each(|(i, ((q, k), v))| {
                        let (item, head) = (i / heads, i % heads);
                        let place = before * e..(before + tokens) * e;
                        let out = [&mut q[place.clone()], &mut k[place.clone()], &mut v[place]];
                        turn.head(|token, part| &row(item * tokens + token)[(part * heads + head) * e..][..e], out);
                    });
                })?;
                before += tokens;
            }
            Ok(())
        })?
    })??;
    let [q, k, v] = parts.map(|values| cpu::from_f32(values, (b, heads, l, e), dtype));
    Ok(Heads { q: q?, k: k?, v: v? })
}

/// As `HeadsArguments` in cuda/heads.cu.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Arguments {
    qkv: Pointer,
    query_scale: Pointer,
    key_scale: Pointer,
    cos: Pointer,
    sin: Pointer,
    q: Pointer,
    k: Pointer,
    v: Pointer,
    item: u64,
    token: u64,
    l: u32,
    h: u32,
    e: u32,
    all: u32,
    before: u32,
    eps: f32,
}

/// Threads of a block, each warp of 32 for one head of one token; and the widest head.
const THREADS: usize = 128;
const WIDEST: usize = 256;

/// One launch for each stream, into its tokens of the joint tensors; `None` if the kernel does not apply.
fn by_kernel(streams: &[Projection<'_>], heads: usize, cos: &Tensor, sin: &Tensor, eps: f32) -> Result<Option<Heads>> {
    let first = streams[0].qkv;
    let (b, _, width) = first.dims3()?;
    let (e, dtype) = (width / (3 * heads), first.dtype());
    let all = streams.iter().map(|stream| stream.qkv.dim(1)).sum::<Result<usize>>()?;
    let table = |x: &Tensor| x.dims() == [all, e / 2] && x.dtype() == DType::F32 && x.is_contiguous();
    let scale = |x: &Tensor| x.dims() == [e] && x.dtype() == DType::F32 && x.is_contiguous();
    let fits = |stream: &Projection<'_>| {
        let qkv = stream.qkv;
        let shaped = matches!(qkv.dims(), [items, l, channels] if *l > 0 && (*items, *channels) == (b, width));
        shaped && qkv.dtype() == dtype && qkv.stride()[2] == 1 && scale(&stream.query_scale) && scale(&stream.key_scale)
    };
    let shaped = width == 3 * heads * e && e.is_multiple_of(2) && e <= WIDEST && b > 0;
    if !(applies(first) && suffix(dtype).is_some() && shaped && table(cos) && table(sin) && streams.iter().all(fits)) {
        return Ok(None);
    }
    let new = || output((b, heads, all, e), dtype, first.device());
    let (q, k, v) = (new()?, new()?, new()?);
    let mut before = 0;
    for stream in streams {
        let (qkv, l) = (stream.qkv, stream.qkv.dim(1)?);
        let inputs = [qkv, &stream.query_scale, &stream.key_scale, cos, sin];
        launch(inputs, [&q, &k, &v], |[qkv_at, query_scale, key_scale, cos, sin], [q, k, v]| Launch {
            kernel: "heads",
            values: dtype,
            grid: [(l * heads).div_ceil(THREADS / 32), b, 1],
            threads: THREADS,
            shared: 0,
            arguments: Arguments {
                qkv: qkv_at,
                query_scale,
                key_scale,
                cos,
                sin,
                q,
                k,
                v,
                item: qkv.stride()[0] as u64,
                token: qkv.stride()[1] as u64,
                l: l as u32,
                h: heads as u32,
                e: e as u32,
                all: all as u32,
                before: before as u32,
                eps,
            },
        })?;
        before += l;
    }
    Ok(Some(Heads { q, k, v }))
}

/// One head of one stream.
struct Turn<'a> {
    scales: &'a [Vec<f32>; 2],
    cos: &'a [f32],
    sin: &'a [f32],
    e: usize,
    eps: f32,
}

impl Turn<'_> {
    /// `read(token, part)` is the head's q, k or v of a token; `out` are its rows `(tokens, e)` of q, k and v.
    fn head<'x>(&self, read: impl Fn(usize, usize) -> &'x [f32], out: [&mut [f32]; 3]) {
        let Self { scales, cos, sin, e, eps } = *self;
        let [q, k, v] = out;
        let mut normed = vec![0f32; e];
        pulp::Arch::new().dispatch(
            #[inline(always)]
            || {
                for (part, (out, scale)) in [q, k].into_iter().zip(scales).enumerate() {
                    let tables = cos.chunks_exact(e / 2).zip(sin.chunks_exact(e / 2));
                    for ((token, out), (cos, sin)) in out.chunks_exact_mut(e).enumerate().zip(tables) {
                        root_mean_square(read(token, part), scale, eps, &mut normed);
                        let pairs = out.as_chunks_mut::<2>().0.iter_mut().zip(normed.as_chunks::<2>().0);
                        pairs.zip(cos.iter().zip(sin)).for_each(|((out, [x, y]), (cos, sin))| {
                            *out = [x * cos - y * sin, x * sin + y * cos];
                        });
                    }
                }
            },
        );
        v.chunks_exact_mut(e).enumerate().for_each(|(token, out)| out.copy_from_slice(read(token, 2)));
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn the_fused_heads_equal_the_composed_ones() {
        let random = |shape: &[usize]| Tensor::randn(0.2f32, 1.3, shape, &Device::Cpu).unwrap();
        let (b, h, e) = (2, 3, 16);
        let (txt, wide) = (random(&[b, 5, 3 * h * e]), random(&[b, 7, 3 * h * e + 11]));
        let img = wide.narrow(2, 4, 3 * h * e).unwrap();
        let scales: Vec<_> = (0..4).map(|_| random(&[e])).collect();
        let streams = [
            Projection { qkv: &txt, query_scale: scales[0].clone(), key_scale: scales[1].clone() },
            Projection { qkv: &img, query_scale: scales[2].clone(), key_scale: scales[3].clone() },
        ];
        let angles = random(&[12, e / 2]);
        let (cos, sin) = (angles.cos().unwrap(), angles.sin().unwrap());
        let plain = composed(&streams, h, &cos, &sin, 1e-6).unwrap();
        let fast = fused(&streams, h, &cos, &sin, 1e-6).unwrap();
        for (a, b) in [(plain.q, fast.q), (plain.k, fast.k), (plain.v, fast.v)] {
            assert_eq!(a.dims(), b.dims());
            let apart = (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(apart < 2e-6, "{apart}");
        }
        let short = angles.narrow(0, 0, 11).unwrap();
        assert!(joint_heads(&streams, h, &short, &short, 1e-6).is_err());
    }
}
