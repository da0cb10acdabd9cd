//! Guidance by a second prediction.

use candle_core::{Result, Tensor};

/// Classifier-free guidance: away from what the negative prompt predicts, `scale` times as far as the prompt does.
///
/// `positive`, `negative` and the result have one shape and dtype; a scale of 1 is the positive prediction. "True" tells it
/// from distilled guidance, a number that FLUX.1-dev is told in a single prediction.
///
/// Follows diffusers 0.42.1 `pipelines/flux/pipeline_flux.py`.
pub fn true_cfg(positive: &Tensor, negative: &Tensor, scale: f64) -> Result<Tensor> {
    negative + ((positive - negative)? * scale)?
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn goes_from_negative_through_positive() {
        let positive = Tensor::new(&[1f32, 2.0, -1.0], &Device::Cpu).unwrap();
        let negative = Tensor::new(&[0f32, 4.0, -1.0], &Device::Cpu).unwrap();
        let guided = |scale| true_cfg(&positive, &negative, scale).unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(guided(1.0), [1.0, 2.0, -1.0]);
        assert_eq!(guided(0.0), [0.0, 4.0, -1.0]);
        assert_eq!(guided(3.5), [3.5, -3.0, -1.0]);
    }
}
