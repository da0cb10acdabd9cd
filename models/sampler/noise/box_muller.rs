//! Sixteen uniform numbers into sixteen normal ones, with the very roundings of PyTorch's AVX2 code.
//!
//! PyTorch takes logarithm, sine and cosine from the Cephes polynomials in f32 (pytorch v2.7.1
//! `aten/src/ATen/native/cpu/avx_mathfun.h`), and its compiler fuses multiplications with additions. Both are repeated here
//! operation by operation: with a mathematics library's functions one value in three would differ in its last bits.

#![allow(clippy::excessive_precision, reason = "Cephes' constants are given with the digits of the original; f32 holds fewer")]

/// Values 0..8 are radii and 8..16 are angles, pairwise; they become cosines and sines of radius times angle.
pub(super) fn transform(values: &mut [f32; 16]) {
    let (radii, angles) = values.split_at_mut(8);
    for (first, second) in radii.iter_mut().zip(angles) {
        // From [0, 1) to (0, 1]: the logarithm needs it.
        let radius = (-2.0 * ln(1.0 - *first)).sqrt();
        let (sin, cos) = sin_cos(std::f32::consts::TAU * *second);
        // Adding the mean, zero, turns a negative zero into a positive one.
        *first = radius * cos + 0.0;
        *second = radius * sin + 0.0;
    }
}

/// Natural logarithm of a normal positive number.
fn ln(x: f32) -> f32 {
    const COEFFICIENTS: [f32; 8] = [
        -1.1514610310e-1,
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
    ];
    /// ln 2 in two parts.
    const LN_2_LOW: f32 = -2.12194440e-4;
    const LN_2_HIGH: f32 = 0.693359375;

    let bits = x.to_bits();
    // x = mantissa * 2^exponent with the mantissa in [sqrt(1/2), sqrt(2)).
    let mut exponent = ((bits >> 23) as i32 - 126) as f32;
    let half_to_one = f32::from_bits(bits & 0x007f_ffff | 0x3f00_0000);
    let mut x = half_to_one - 1.0;
    if half_to_one < std::f32::consts::FRAC_1_SQRT_2 {
        exponent -= 1.0;
        x += half_to_one;
    }
    let square = x * x;
    let series = COEFFICIENTS.iter().fold(7.0376836292e-2f32, |y, coefficient| y.mul_add(x, *coefficient));
    let y = (series * x).mul_add(square, exponent * LN_2_LOW);
    let y = square.mul_add(-0.5, y);
    exponent.mul_add(LN_2_HIGH, x + y)
}

/// Sine and cosine of an angle in [0, 2 pi].
fn sin_cos(angle: f32) -> (f32, f32) {
    /// pi / 4 in three parts.
    const QUARTER_PI: [f32; 3] = [0.78515625, 2.4187564849853515625e-4, 3.77489497744594108e-8];

    // The octant, rounded up to an even number.
    let octant = ((angle * std::f32::consts::FRAC_2_PI * 2.0) as u32 + 1) & !1;
    let x = QUARTER_PI.iter().fold(angle, |x, part| (octant as f32).mul_add(-part, x));
    let square = x * x;

    let cos = 2.443315711809948e-5f32.mul_add(square, -1.388731625493765e-3);
    let cos = cos.mul_add(square, 4.166664568298827e-2) * square;
    let cos = cos.mul_add(square, square * -0.5) + 1.0;
    let sin = (-1.9515295891e-4f32).mul_add(square, 8.3321608736e-3);
    let sin = sin.mul_add(square, -1.6666654611e-1) * square;
    let sin = sin.mul_add(x, x);

    match octant & 7 {
        0 => (sin, cos),
        2 => (cos, -sin),
        4 => (-sin, -cos),
        _ => (-cos, sin),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_polynomials_are_good_to_f32() {
        for i in 1..=(1 << 16) {
            let x = i as f32 / (1 << 16) as f32;
            assert!((ln(x) - x.ln()).abs() <= 4e-7 * x.ln().abs().max(0.1), "ln {x}");
            let angle = std::f32::consts::TAU * x;
            let (sin, cos) = sin_cos(angle);
            assert!((sin - angle.sin()).abs() < 2e-7 && (cos - angle.cos()).abs() < 2e-7, "angle {angle}");
        }
    }
}
