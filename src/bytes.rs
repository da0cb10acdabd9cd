//! Numbers of bytes as people read them.

/// `2.5 MB`, `640 MB`, `23.8 GB`.
pub(crate) fn in_words(bytes: u64) -> String {
    let million = bytes as f64 / 1e6;
    match bytes {
        0..10_000_000 => format!("{million:.1} MB"),
        10_000_000..999_500_000 => format!("{million:.0} MB"),
        _ => format!("{:.1} GB", million / 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_digits_tell() {
        let said = [0, 2_460_000, 999_499_999, 999_500_000, 23_800_000_000].map(in_words);
        assert_eq!(said, ["0.0 MB", "2.5 MB", "999 MB", "1.0 GB", "23.8 GB"]);
    }
}
