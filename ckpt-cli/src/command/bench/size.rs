//! Sizes as people write them.

use std::str::FromStr;

/// A number of bytes, at least one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Size(pub(super) u64);

/// The largest buffer.
const LARGEST: u64 = 1 << 40;

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let unit = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "k" | "kib" => 1 << 10,
            "m" | "mib" => 1 << 20,
            "g" | "gib" => 1 << 30,
            "kb" => 1_000,
            "mb" => 1_000_000,
            "gb" => 1_000_000_000,
            _ => return Err(format!("`{text}` has no unit of B, KiB, MiB, GiB, KB, MB, GB")),
        };
        let bytes = number.parse::<u64>().ok().and_then(|number| number.checked_mul(unit));
        match bytes {
            Some(bytes @ 1..=LARGEST) => Ok(Self(bytes)),
            _ => Err(format!("`{text}` is no size from 1 B to 1024 GiB")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_binary_unless_they_say_otherwise() {
        let parsed = |text: &str| text.parse::<Size>().map(|size| size.0);
        for (text, bytes) in [
            ("1", 1),
            ("17B", 17),
            ("4KiB", 4096),
            ("4k", 4096),
            ("64 MiB", 64 << 20),
            ("1g", 1 << 30),
            ("3MB", 3_000_000),
        ] {
            assert_eq!(parsed(text), Ok(bytes), "{text}");
        }
        for bad in ["", "0", "MiB", "-1", "1.5MiB", "2TiB", "99999999999GiB", "2000GiB"] {
            assert!(parsed(bad).is_err(), "{bad}");
        }
    }
}
