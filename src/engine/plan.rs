//! What a model's parts are kept as, and where, so that they fit a card.

use std::fmt;

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device};
use models::flux;
use models::lora::RESIDENT;
use models::nn::Home;
use models::vae;
use models::weights::{Keep, OnHost};

use super::sizes::{Sizes, TOKENS, work};
use super::{Error, measured};
use crate::bytes::in_words;

/// How fast main memory reaches a card, to say what waiting costs: PCIe 4.0 with 16 lanes, from memory that is not pinned.
const BYTES_PER_SECOND: f64 = 10e9;

/// One part in so many of the weights is lost between them.
const FRAGMENTS: u64 = 20;

/// The rank, on every matrix of the blocks, that plans leave room for where LoRAs are branches.
const RANK: u64 = 16;

/// What the driver and its libraries take of a card before the first tensor.
pub const CONTEXT: u64 = 600 << 20;

/// The part of it that comes after the device was opened, when libraries load their kernels.
pub const LIBRARIES: u64 = 200 << 20;

/// Where everything is, and what it takes.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Computed in.
    pub dtype: DType,
    pub transformer: Keep,
    pub on_host: OnHost,
    /// Where pristine weights are while LoRAs are on them; by the memory that is free if not said.
    pub home: Option<Home>,
    /// What the card must hold, if it was reckoned: weights, pristine weights and work, in bytes.
    pub need: Option<Need>,
    /// Operations a second on 16-bit values that the card reaches at best, if it is known.
    pub rate: Option<f64>,
    /// What a step of 1024 x 1024 took when it was measured last, in seconds.
    pub measured: Option<f64>,
}

/// Bytes on the card.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    pub transformer: u64,
    pub text: u64,
    pub vae: u64,
    /// LoRAs: pristine weights beside changed ones and what was used lately, or branches.
    pub loras: u64,
    /// Activations of a picture of 1024 x 1024, and places for what is sent.
    pub work: u64,
    /// Operations of a step of such a picture.
    pub operations: u64,
    /// Sent to the card for every step, every picture and every new prompt.
    pub sent: [u64; 3],
    /// What there is, without the driver's part.
    pub have: u64,
}

impl Need {
    /// Beside the weights: what the autoencoder may take once the steps are done.
    pub(super) fn for_pictures(&self) -> u64 {
        self.have.saturating_sub(self.all() - self.work)
    }

    #[must_use]
    pub fn all(&self) -> u64 {
        let weights = self.transformer + self.text + self.vae + self.loras;
        weights + weights / FRAGMENTS + self.work
    }
}

impl From<DType> for Plan {
    /// Everything on the device, as stored.
    fn from(dtype: DType) -> Self {
        Self { dtype, transformer: Keep::Stored, on_host: OnHost::default(), home: None, need: None, rate: None, measured: None }
    }
}

/// What is tried, best first: what the transformer is kept as, what is in main memory, where pristine weights are. T5 stays as it is
/// stored, so that pictures depend on the transformer's format only.
fn options(blocks: [usize; 2]) -> Vec<(Keep, OnHost, Home)> {
    let (stored, fp8, blocks_of) = (Keep::Stored, Keep::Fp8, Keep::Gguf);
    let here = OnHost::default();
    let (text, both) = (OnHost { text: true, ..here }, OnHost { text: true, modulations: true, ..here });
    let mut options = vec![
        (stored, here, Home::Device),
        (stored, here, Home::Host),
        (stored, text, Home::Host),
        (stored, both, Home::Host),
        (fp8, here, Home::Host),
        (fp8, text, Home::Host),
        (fp8, both, Home::Host),
        (blocks_of(GgmlDType::Q6K), both, Home::Host),
        (blocks_of(GgmlDType::Q5K), both, Home::Host),
        (blocks_of(GgmlDType::Q4K), both, Home::Host),
    ];
    // Blocks from the end, a few more each time: those that stay are used from the card.
    let all = blocks[0] + blocks[1];
    for eighths in 1..=8 {
        let blocks_from = without(blocks, (all * eighths).div_ceil(8));
        options.push((fp8, OnHost { blocks_from, ..both }, Home::Host));
    }
    options
}

/// Double and single blocks from which on so many wait: single ones first, from the end.
fn without([double, single]: [usize; 2], away: usize) -> [usize; 2] {
    [double.saturating_sub(away.saturating_sub(single)), single.saturating_sub(away)]
}

/// What waits in main memory where `on_host` leaves too little of the card: T5 and the modulations, then a quarter of the blocks more each
/// time. `None` if everything does.
pub(super) fn smaller(on_host: OnHost, blocks: [usize; 2]) -> Option<OnHost> {
    if !(on_host.text && on_host.modulations) {
        return Some(OnHost { text: true, modulations: true, ..on_host });
    }
    let all = blocks[0] + blocks[1];
    let here = on_host.blocks_from[0].min(blocks[0]) + on_host.blocks_from[1].min(blocks[1]);
    (here > 0).then(|| OnHost { blocks_from: without(blocks, all - here + all.div_ceil(4)), ..on_host })
}

/// The same where main memory is the device's own: nothing is gained by waiting there, and Metal has no e4m3.
fn options_in_shared() -> Vec<(Keep, OnHost, Home)> {
    let blocks = [GgmlDType::Q8_0, GgmlDType::Q6K, GgmlDType::Q5K, GgmlDType::Q4K].map(Keep::Gguf);
    let kept =
        [(Keep::Stored, Home::Device), (Keep::Stored, Home::File)].into_iter().chain(blocks.map(|keep| (keep, Home::File)));
    kept.map(|(keep, home)| (keep, OnHost::default(), home)).collect()
}

/// Bytes that a plan may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    /// Of a card, without the driver's part.
    Card(u64),
    /// Of main memory, which is the device's too.
    Shared(u64),
}

impl Plan {
    /// The same with what is known of how fast `device` is with a transformer of this size.
    #[must_use]
    pub fn timed(self, device: &Device, transformer: &flux::Config) -> Self {
        Self { rate: kernels::arithmetic_rate(device), measured: measured::last(device, transformer, &self), ..self }
    }

    /// What the model is kept as, as `--dtype` calls it; of a file that is quantised, what it is computed in.
    #[must_use]
    pub fn name(&self) -> String {
        match self.transformer {
            Keep::Stored => self.dtype.as_str().into(),
            other => other.to_string(),
        }
    }

    /// The best plan that fits. `asked` fixes what the transformer is kept as.
    ///
    /// Errors if even the smallest does not fit.
    pub fn fitting(dtype: DType, sizes: &Sizes, room: Room, asked: Option<Keep>) -> Result<Self, Error> {
        let (Room::Card(have) | Room::Shared(have)) = room;
        let mut smallest = u64::MAX;
        for plan in Self::all(dtype, sizes, room, asked) {
            let need = plan.need.map_or(0, |need| need.all());
            if need <= have {
                return Ok(plan);
            }
            smallest = smallest.min(need);
        }
        Err(Error::CardTooSmall { need: smallest, have })
    }

    /// Every plan that is tried, best first.
    fn all(dtype: DType, sizes: &Sizes, room: Room, asked: Option<Keep>) -> Vec<Self> {
        let config = &sizes.transformer;
        let mut plans: Vec<Self> = Vec::new();
        let (have, options) = match room {
            Room::Card(have) => (have, options([config.double_blocks, config.single_blocks])),
            Room::Shared(have) => (have, options_in_shared()),
        };
        for (transformer, on_host, home) in options {
            // What is quantised in its file stays so, and may be multiplied so; what was asked for is not bargained over.
            let transformer = match (sizes.quantised[0], asked) {
                (Some(_), Some(Keep::Fp8Products)) if sizes.fp8 => Keep::Fp8Products,
                (Some(_), _) => Keep::Stored,
                (None, Some(asked)) => asked,
                (None, None) => transformer,
            };
            // Its dense weights are what it is made of, and stay on the card.
            let home = if transformer == Keep::Fp8Merged { Home::Device } else { home };
            if transformer == Keep::Fp8Merged && on_host.blocks_from != OnHost::default().blocks_from {
                continue;
            }
            let mut plan = Self { dtype, transformer, on_host, home: Some(home), need: None, rate: None, measured: None };
            plan.need = Some(plan.reckon(sizes, have));
            let same =
                |known: &Self| (known.transformer, known.on_host, known.home) == (plan.transformer, plan.on_host, plan.home);
            if !plans.iter().any(same) {
                plans.push(plan);
            }
        }
        // Streaming blocks comes last, whatever they are kept as.
        plans.sort_by_key(|plan| plan.on_host.blocks_from != OnHost::default().blocks_from);
        plans
    }

    fn reckon(&self, sizes: &Sizes, have: u64) -> Need {
        let config = &sizes.transformer;
        let dense = |values: u64| values * self.dtype.size_in_bytes() as u64;
        let kept = |keep: Keep, values: u64, columns: usize| match keep.fitting(columns) {
            Keep::Stored => dense(values),
            other => other.bytes(values, columns),
        };
        let [double, single] = sizes.blocks();
        // A file that is quantised is so throughout, more or less.
        let of_block = |values: u64| match sizes.quantised[0] {
            Some(bytes) => {
                let all = double * config.double_blocks as u64 + single * config.single_blocks as u64;
                (bytes as f64 * values as f64 / (all + sizes.modulations() + sizes.ends()) as f64) as u64
            }
            None => kept(self.transformer, values, config.hidden),
        };
        let here = |blocks: usize, from: usize| blocks.min(from) as u64;
        let [double_from, single_from] = self.on_host.blocks_from;
        let [doubles, singles] = [here(config.double_blocks, double_from), here(config.single_blocks, single_from)];
        let blocks = doubles * of_block(double) + singles * of_block(single);
        let all_blocks = config.double_blocks as u64 * of_block(double) + config.single_blocks as u64 * of_block(single);
        let modulations = if sizes.quantised[0].is_some() { of_block(sizes.modulations()) } else { dense(sizes.modulations()) };
        // T5's activations overflow f16, so it is f32 then.
        let text_value = if self.dtype == DType::F16 { 4 } else { dense(1) };
        let t5 = sizes.quantised[1].unwrap_or(sizes.t5 * text_value);
        let on_card = |bytes: u64, away: bool| if away { 0 } else { bytes };
        let transformer = blocks + on_card(modulations, self.on_host.modulations) + dense(sizes.ends());
        let text = on_card(t5, self.on_host.text) + sizes.table * text_value + dense(sizes.clip);
        // Dense weights are merged into; others have branches beside them.
        let merged = self.transformer == Keep::Fp8Merged;
        let dense_blocks = self.transformer == Keep::Stored && sizes.quantised[0].is_none();
        let [double_blocks, single_blocks] = [config.double_blocks as u64 * double, config.single_blocks as u64 * single];
        let beside = match dense_blocks {
            true => transformer + text,
            false if merged => transformer - blocks + dense(double_blocks + single_blocks) + text,
            false => transformer - blocks + text,
        };
        let values = double_blocks + single_blocks + sizes.modulations() + sizes.ends() + sizes.t5 + sizes.clip;
        let kept_twice = if self.home == Some(Home::Device) { beside + dense(values) / RESIDENT } else { 0 };
        let loras = kept_twice + if dense_blocks || merged { 0 } else { dense(sizes.factors(RANK)) };
        let sent = |bytes: u64, away: bool| if away { bytes } else { 0 };
        let sent = [all_blocks - blocks, sent(modulations, self.on_host.modulations), sent(t5, self.on_host.text)];
        let (d, mlp) = (config.hidden as u64, config.mlp as u64);
        // What is sent before the steps goes where they work later.
        let places = if sent[0] > 0 { kernels::PLACES as u64 * of_block(d * (3 * d + mlp)) } else { 0 };
        let (vae, work, operations) = (dense(sizes.vae), work(config, TOKENS, dense(1)) + places, sizes.operations());
        Need { transformer, text, vae, loras, work, operations, sent, have }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dense = self.dtype.as_str();
        match self.transformer {
            Keep::Stored => write!(f, "transformer as stored or in {dense}")?,
            other => write!(f, "transformer {other}")?,
        }
        let Some(need) = self.need else { return write!(f, ", everything on the device") };
        let decoding = vae::decode_bytes(vae::CHANNELS, 1024 * 1024, self.dtype.size_in_bytes(), kernels::fused());
        let tiles = if decoding as u64 > need.for_pictures() { " in tiles" } else { "" };
        write!(f, " ({})", in_words(need.transformer))?;
        let wait = |bytes: u64| format!("{}, about {:.1} s", in_words(bytes), bytes as f64 / BYTES_PER_SECOND);
        let [step, picture, prompt] = need.sent;
        if step > 0 {
            write!(f, ", the rest of its blocks sent in every step ({})", wait(step))?;
        }
        if picture > 0 {
            write!(f, ", its modulations sent once a picture ({})", wait(picture))?;
        }
        write!(f, "; T5")?;
        if prompt > 0 {
            write!(f, " sent for each new prompt ({})", wait(prompt))?;
        }
        write!(f, ", CLIP: {}; autoencoder {}{tiles}; work {}", in_words(need.text), in_words(need.vae), in_words(need.work))?;
        match self.home {
            _ if self.transformer == Keep::Fp8Merged => {
                write!(f, "; {dense} weights, which LoRAs are merged into, {}", in_words(need.loras))?
            }
            Some(Home::Device) if self.transformer == Keep::Stored => {
                write!(f, "; LoRAs and pristine weights beside them {}", in_words(need.loras))?
            }
            _ if need.loras > 0 => write!(f, "; LoRAs as branches of the blocks {}", in_words(need.loras))?,
            Some(home) => write!(f, "; pristine weights beside LoRAs: {home}")?,
            None => {}
        }
        write!(f, ": {} of {}", in_words(need.all()), in_words(need.have))?;
        let Some(rate) = self.rate else { return Ok(()) };
        let rate = if matches!(self.transformer, Keep::Fp8Products | Keep::Fp8Merged) { 2. * rate } else { rate };
        let (arithmetic, sending) = (need.operations as f64 / rate, step as f64 / BYTES_PER_SECOND);
        let bound = if sending > arithmetic { "sending blocks" } else { "arithmetic" };
        write!(f, "; a step of 1024 x 1024 takes {:.2} s at the least, bound by {bound}", arithmetic.max(sending))?;
        match self.measured {
            Some(seconds) => write!(f, "; the last ones that were measured took {seconds:.2} s"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dev() -> Sizes {
        Sizes::FLUX1
    }

    fn fitting(gigabytes: f64, asked: Option<Keep>) -> Result<Plan, Error> {
        Plan::fitting(DType::BF16, &dev(), Room::Card((gigabytes * 1e9) as u64 - CONTEXT), asked)
    }

    #[test]
    fn the_sizes_are_those_of_the_model() {
        let sizes = dev();
        let [double, single] = sizes.blocks();
        let all = 19 * double + 38 * single + sizes.modulations() + sizes.ends();
        // Without biases and head norms, which are 0.01 % of it.
        assert!((11_895_000_000..11_901_408_320).contains(&all), "{all}");
        assert_eq!(sizes.modulations(), 3_227_516_928);
    }

    #[test]
    fn less_and_less_stays_on_a_card_that_is_full() {
        let next = |on_host: OnHost| smaller(on_host, [19, 38]);
        let away = |blocks_from| Some(OnHost { text: true, modulations: true, blocks_from });
        let mut on_host = OnHost::default();
        for blocks_from in [[usize::MAX; 2], [19, 23], [19, 8], [12, 0], [0, 0]] {
            assert_eq!(next(on_host), away(blocks_from));
            on_host = next(on_host).unwrap();
        }
        assert_eq!(next(on_host), None);
    }

    #[test]
    fn every_card_has_its_plan() {
        for (gigabytes, transformer, text_away, modulations_away, home) in [
            (140., Keep::Stored, false, false, Home::Device),
            (80., Keep::Stored, false, false, Home::Device),
            (48., Keep::Stored, false, false, Home::Host),
            (32., Keep::Stored, true, false, Home::Host),
            (24., Keep::Stored, true, true, Home::Host),
            (16., Keep::Fp8, true, true, Home::Host),
            (12., Keep::Gguf(GgmlDType::Q6K), true, true, Home::Host),
            // A part of the blocks is sent in every step.
            (8., Keep::Fp8, true, true, Home::Host),
            (4., Keep::Fp8, true, true, Home::Host),
        ] {
            let plan = fitting(gigabytes, None).unwrap();
            assert_eq!((plan.transformer, plan.on_host.text), (transformer, text_away), "{gigabytes}: {plan}");
            assert_eq!((plan.on_host.modulations, plan.home), (modulations_away, Some(home)), "{gigabytes}: {plan}");
            assert!(plan.need.unwrap().all() + CONTEXT <= (gigabytes * 1e9) as u64);
        }
    }

    /// Of a Mac's memory: what waits in it takes as much of it as what is used.
    #[test]
    fn shared_memory_has_plans_of_its_own() {
        let fitting = |gigabytes: u64, asked| Plan::fitting(DType::BF16, &dev(), Room::Shared(gigabytes * 1_000_000_000), asked);
        let (stored, blocks) = (Keep::Stored, Keep::Gguf);
        for (gigabytes, transformer, home) in [
            (96, stored, Home::Device),
            (48, stored, Home::File),
            (30, blocks(GgmlDType::Q8_0), Home::File),
            (25, blocks(GgmlDType::Q4K), Home::File),
        ] {
            let plan = fitting(gigabytes, None).unwrap();
            assert_eq!((plan.transformer, plan.home), (transformer, Some(home)), "{gigabytes}: {plan}");
            assert_eq!(plan.on_host, OnHost::default());
        }
        assert!(matches!(fitting(12, None), Err(Error::CardTooSmall { .. })));
        assert_eq!(fitting(30, Some(blocks(GgmlDType::Q4_0))).unwrap().transformer, blocks(GgmlDType::Q4_0));
    }

    #[test]
    fn less_memory_never_makes_a_plan_that_needs_more() {
        let mut before = u64::MAX;
        for tenths in (15..1500).rev() {
            let Ok(plan) = fitting(f64::from(tenths) / 10., None) else { continue };
            let need = plan.need.unwrap();
            assert!(need.all() <= need.have && need.all() <= before, "{tenths}: {plan}");
            before = need.all();
        }
        assert!(before < 4_000_000_000, "the smallest card with a plan: {before}");
        let Err(Error::CardTooSmall { need, have }) = fitting(1.5, None) else { panic!("1.5 GB hold no picture's work") };
        assert!(need > have);
    }

    #[test]
    fn a_step_takes_at_least_its_arithmetic_or_what_is_sent() {
        // By hand, of hidden width d: 24 d² values of a double block and 12 d² of a single one.
        let d2 = 3072. * 3072.;
        let by_hand = 4608. * d2 * (19. * 24. + 2. * 38. * 12.) + 57. * 4. * 4608. * 4608. * 3072.;
        let plan = |gigabytes, asked| Plan { rate: Some(989e12), ..fitting(gigabytes, asked).unwrap() };
        let operations = plan(80., None).need.unwrap().operations as f64;
        assert!((operations / by_hand - 1.).abs() < 1e-9 && (74e12..75e12).contains(&operations), "{operations:e}");
        let said = |plan: Plan| plan.to_string().rsplit_once("; ").unwrap().1.to_owned();
        assert_eq!(said(plan(80., None)), "a step of 1024 x 1024 takes 0.08 s at the least, bound by arithmetic");
        assert_eq!(
            said(plan(80., Some(Keep::Fp8Products))),
            "a step of 1024 x 1024 takes 0.04 s at the least, bound by arithmetic"
        );
        assert!(said(plan(4., None)).ends_with("s at the least, bound by sending blocks"), "{}", plan(4., None));
    }

    #[test]
    fn fp8_with_loras_inside_keeps_dense_weights_on_the_card() {
        let plan = |gigabytes| fitting(gigabytes, Some(Keep::Fp8Merged));
        for (gigabytes, text_away) in [(80., false), (48., true)] {
            let plan = plan(gigabytes).unwrap();
            assert_eq!(
                (plan.transformer, plan.home, plan.on_host.text),
                (Keep::Fp8Merged, Some(Home::Device), text_away),
                "{plan}"
            );
            assert_eq!((plan.on_host.blocks_from, plan.need.unwrap().sent[0]), ([usize::MAX; 2], 0), "{plan}");
            assert!(plan.to_string().contains("; bf16 weights, which LoRAs are merged into, "), "{plan}");
        }
        // 8.67e9 values of blocks in both; modulations, T5 and CLIP twice in bf16; what RESIDENT leaves to LoRAs.
        let need = plan(80.).unwrap().need.unwrap();
        assert!((35e9..45e9).contains(&(need.loras as f64)) && need.transformer < 16_000_000_000, "{need:?}");
        assert!(matches!(plan(24.), Err(Error::CardTooSmall { .. })), "another precision is not chosen in its place");
    }

    #[test]
    fn what_is_asked_for_and_what_a_file_is_are_kept() {
        let plan = fitting(24., Some(Keep::Fp8)).unwrap();
        assert_eq!((plan.transformer, plan.on_host.blocks_from), (Keep::Fp8, [usize::MAX; 2]), "{plan}");
        let streamed = fitting(8., Some(Keep::Fp8)).unwrap();
        assert!(streamed.transformer == Keep::Fp8 && streamed.need.unwrap().sent[0] > 0, "{streamed}");
        assert!(streamed.to_string().contains("sent in every step"), "{streamed}");
        let whole = fitting(8., Some(Keep::Stored)).unwrap();
        assert!(whole.transformer == Keep::Stored && whole.need.unwrap().sent[0] > 13_000_000_000, "{whole}");
        // A Q4_0 file of 6.7 GB.
        let sizes = Sizes { quantised: [Some(6_700_000_000), Some(2_600_000_000)], ..dev() };
        let plan = Plan::fitting(DType::BF16, &sizes, Room::Card(16_000_000_000 - CONTEXT), None).unwrap();
        assert_eq!((plan.transformer, plan.on_host, plan.home), (Keep::Stored, OnHost::default(), Some(Home::Host)), "{plan}");
        let need = plan.need.unwrap();
        assert!((need.transformer as f64 / 6.7e9 - 1.).abs() < 0.03 && need.loras == 130_744_320, "{need:?}");
        assert!(plan.to_string().contains("; LoRAs as branches of the blocks 131 MB: "), "{plan}");
    }
}
