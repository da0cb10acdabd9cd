//! How much noise is left at each step: flow matching with Euler steps, and FLUX.1's shift towards noise for large pictures.
//!
//! Follows diffusers 0.42.1 `schedulers/scheduling_flow_match_euler_discrete.py` and `pipelines/flux/pipeline_flux*.py`, in
//! the same precisions, so that the numbers are equal bit for bit.

use candle_core::{DType, Result as TensorResult, Tensor};
use serde::Deserialize;
use serde_json::Value;

use super::Error;

/// How the noise levels of a model are spaced. Read from a diffusers `scheduler_config.json`, or one of the published two.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule(Shift);

#[derive(Debug, Clone, PartialEq)]
enum Shift {
    /// The same for every picture.
    Fixed(f64),
    /// Grows with the number of image tokens.
    Dynamic { exponential: bool, base: Anchor, max: Anchor },
}

/// A shift and the number of image tokens at which it applies; in between and beyond, a straight line.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Anchor {
    tokens: f64,
    shift: f64,
}

impl Schedule {
    /// FLUX.1-dev's published schedule.
    pub fn dev() -> Self {
        let (base, max) = (Anchor { tokens: 256.0, shift: 0.5 }, Anchor { tokens: 4096.0, shift: 1.15 });
        Self(Shift::Dynamic { exponential: true, base, max })
    }

    /// FLUX.1-schnell's published schedule: evenly spaced.
    pub fn schnell() -> Self {
        Self(Shift::Fixed(1.0))
    }

    /// The schedule of a diffusers `scheduler_config.json`; without one, the published schedule of dev for a model that reads
    /// distilled `guidance` and of schnell for one that does not.
    ///
    /// What the config leaves out has diffusers' defaults; a setting that would change the numbers in a way that is not
    /// implemented here is an error that names it.
    pub fn read(config: Option<&Value>, guidance: bool) -> Result<Self, Error> {
        match config {
            Some(config) => Self::from_config(&Config::deserialize(config)?),
            None if guidance => Ok(Self::dev()),
            None => Ok(Self::schnell()),
        }
    }

    fn from_config(config: &Config) -> Result<Self, Error> {
        config.check()?;
        if !config.use_dynamic_shifting {
            return Ok(Self(Shift::Fixed(config.shift)));
        }
        let exponential = config.time_shift_type == "exponential";
        let base = Anchor { tokens: config.base_image_seq_len, shift: config.base_shift };
        let max = Anchor { tokens: config.max_image_seq_len, shift: config.max_shift };
        Ok(Self(Shift::Dynamic { exponential, base, max }))
    }

    /// The noise levels of `steps` steps for a picture of `image_tokens` tokens, (height / 16)(width / 16): `steps` falling
    /// numbers from 1, all noise, and a final 0, none. Step i goes from level i to level i + 1.
    pub fn sigmas(&self, steps: usize, image_tokens: usize) -> Vec<f32> {
        let shift = |sigma: f32| match self.0 {
            // All in f32: numpy gives a Python number the array's precision.
            Shift::Fixed(shift) => shift as f32 * sigma / (1.0 + (shift - 1.0) as f32 * sigma),
            Shift::Dynamic { exponential, base, max } => {
                let mu = mu(base, max, image_tokens);
                let weight = if exponential { mu.exp() } else { mu } as f32;
                weight / (weight + (1.0 / sigma - 1.0))
            }
        };
        evenly(steps).map(shift).chain([0.0]).collect()
    }
}

/// The step (from 0) at which a picture that starts from another one begins: of `steps` steps, `strength` (rounded up) are
/// walked. A `strength` of 1 walks all and keeps nothing.
///
/// Errors unless 0 < `strength` <= 1 and a step is left.
pub fn first_step(steps: usize, strength: f64) -> Result<usize, Error> {
    if !(strength > 0.0 && strength <= 1.0) {
        return Err(Error::Strength { strength });
    }
    // As diffusers has it: the product's rounding decides what happens on the edge.
    let first = (steps as f64 - (steps as f64 * strength).min(steps as f64)) as usize;
    if first >= steps {
        return Err(Error::NothingLeft { strength, steps });
    }
    Ok(first)
}

/// One Euler step along `velocity`, the transformer's prediction, from noise level `sigma` to `next`.
///
/// `latents` and `velocity` have one shape, the result's; the result is f32.
pub fn euler_step(latents: &Tensor, velocity: &Tensor, sigma: f32, next: f32) -> TensorResult<Tensor> {
    // f32 because steps are small beside the latents: in bf16 much of the last ones would be lost.
    latents.to_dtype(DType::F32)? + (velocity.to_dtype(DType::F32)? * f64::from(next - sigma))?
}

/// Clean latents as they are at noise level `sigma`: `sigma * noise + (1 - sigma) * latents`. One shape, f32.
pub fn add_noise(latents: &Tensor, noise: &Tensor, sigma: f32) -> TensorResult<Tensor> {
    (noise * f64::from(sigma))? + (latents * f64::from(1.0 - sigma))?
}

/// numpy's `linspace(1, 1 / steps, steps)`, computed in f64 and rounded to f32.
fn evenly(steps: usize) -> impl Iterator<Item = f32> {
    let last = 1.0 / steps as f64;
    let gap = (last - 1.0) / (steps.max(2) - 1) as f64;
    (0..steps).map(move |i| if i > 0 && i + 1 == steps { last } else { i as f64 * gap + 1.0 } as f32)
}

/// The shift for a picture of `image_tokens` tokens, on the line through both anchors.
fn mu(base: Anchor, max: Anchor, image_tokens: usize) -> f64 {
    let slope = (max.shift - base.shift) / (max.tokens - base.tokens);
    image_tokens as f64 * slope + (base.shift - slope * base.tokens)
}

/// What a `scheduler_config.json` says. Defaults are those of diffusers' class.
#[derive(Debug, Deserialize)]
#[serde(default)]
struct Config {
    #[serde(rename = "_class_name")]
    class_name: String,
    num_train_timesteps: f64,
    shift: f64,
    use_dynamic_shifting: bool,
    base_shift: f64,
    max_shift: f64,
    base_image_seq_len: f64,
    max_image_seq_len: f64,
    time_shift_type: String,
    shift_terminal: Option<f64>,
    invert_sigmas: bool,
    use_karras_sigmas: bool,
    use_exponential_sigmas: bool,
    use_beta_sigmas: bool,
    use_flow_sigmas: bool,
    stochastic_sampling: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            class_name: Self::CLASS.into(),
            num_train_timesteps: 1000.0,
            shift: 1.0,
            use_dynamic_shifting: false,
            base_shift: 0.5,
            max_shift: 1.15,
            base_image_seq_len: 256.0,
            max_image_seq_len: 4096.0,
            time_shift_type: "exponential".into(),
            shift_terminal: None,
            invert_sigmas: false,
            use_karras_sigmas: false,
            use_exponential_sigmas: false,
            use_beta_sigmas: false,
            use_flow_sigmas: false,
            stochastic_sampling: false,
        }
    }
}

impl Config {
    const CLASS: &str = "FlowMatchEulerDiscreteScheduler";

    fn check(&self) -> Result<(), Error> {
        let refuse =
            |field, value: &dyn ToString, supported| Err(Error::Unsupported { field, value: value.to_string(), supported });
        if self.class_name != Self::CLASS {
            return refuse("_class_name", &self.class_name, Self::CLASS);
        }
        if !["exponential", "linear"].contains(&self.time_shift_type.as_str()) {
            return refuse("time_shift_type", &self.time_shift_type, "exponential, linear");
        }
        if let Some(terminal) = self.shift_terminal.filter(|terminal| *terminal != 0.0) {
            return refuse("shift_terminal", &terminal, "null");
        }
        // The pipelines divide by 1000 whatever this says.
        if self.num_train_timesteps != 1000.0 {
            return refuse("num_train_timesteps", &self.num_train_timesteps, "1000");
        }
        if self.shift.is_nan() || self.shift <= 0.0 {
            return refuse("shift", &self.shift, "a positive number");
        }
        if self.use_dynamic_shifting && self.base_image_seq_len == self.max_image_seq_len {
            return refuse("max_image_seq_len", &self.max_image_seq_len, "a number other than base_image_seq_len");
        }
        let switches = [
            ("invert_sigmas", self.invert_sigmas),
            ("use_karras_sigmas", self.use_karras_sigmas),
            ("use_exponential_sigmas", self.use_exponential_sigmas),
            ("use_beta_sigmas", self.use_beta_sigmas),
            ("use_flow_sigmas", self.use_flow_sigmas),
            ("stochastic_sampling", self.stochastic_sampling),
        ];
        match switches.iter().find(|(_, on)| *on) {
            Some((field, _)) => refuse(field, &true, "false"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
