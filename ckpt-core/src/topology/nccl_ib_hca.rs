//! The value of `NCCL_IB_HCA`, by NCCL's own rules.
//!
//! One leading `^` (exclude), then one leading `=` (exact names), then a comma list of `name[:port[:rail[:plane]]]`.
//! Empty tokens are skipped and an empty or absent number means any. Without `=` a token matches every device whose
//! name starts with it. An empty list matches everything, so `""` takes all devices and `^` alone takes none.

use std::{fmt, str::FromStr};

use thiserror::Error;

/// One element of the list.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HcaToken {
    /// A device name or the start of one; not empty.
    pub name: String,
    /// Port number; `None` is any.
    pub port: Option<u32>,
    /// Rail number; kept for `Display`, the choice of devices does not depend on it.
    pub rail: Option<u32>,
    /// Plane number; like `rail`.
    pub plane: Option<u32>,
}

/// A parsed `NCCL_IB_HCA`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct HcaFilter {
    /// `^`: take what matches no token.
    pub exclude: bool,
    /// `=`: names must be equal.
    pub exact: bool,
    /// The list; empty matches everything.
    pub tokens: Vec<HcaToken>,
}

/// Why a value is not a filter.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ParseHcaFilterError {
    /// A number is none, or too large.
    #[error("NCCL_IB_HCA: `{token}`: {part} `{value}` is not a number; write name[:port[:rail[:plane]]]")]
    Number {
        /// The element.
        token: String,
        /// `port`, `rail` or `plane`.
        part: &'static str,
        /// What stands there.
        value: String,
    },
    /// Numbers without a name.
    #[error("NCCL_IB_HCA: `{token}` has no device name; write name[:port[:rail[:plane]]]")]
    NoName {
        /// The element.
        token: String,
    },
    /// More than four parts.
    #[error("NCCL_IB_HCA: `{token}` has more than name:port:rail:plane")]
    TooManyParts {
        /// The element.
        token: String,
    },
}

impl HcaFilter {
    /// Whether the filter takes this port.
    pub fn takes(&self, device: &str, port: u32) -> bool {
        let matches_name =
            |t: &HcaToken| if self.exact { t.name == device } else { device.starts_with(&t.name) };
        let matches = self.tokens.is_empty()
            || self.tokens.iter().any(|t| matches_name(t) && t.port.is_none_or(|p| p == port));
        matches != self.exclude
    }
}

impl FromStr for HcaFilter {
    type Err = ParseHcaFilterError;

    fn from_str(value: &str) -> Result<Self, Self::Err> {
        let value = value.trim();
        let (exclude, value) = strip(value, '^');
        let (exact, value) = strip(value, '=');
        let tokens = value
            .split(',')
            .map(str::trim)
            .filter(|token| !token.is_empty())
            .map(parse_token)
            .collect::<Result<_, _>>()?;
        Ok(Self { exclude, exact, tokens })
    }
}

fn strip(value: &str, prefix: char) -> (bool, &str) {
    match value.strip_prefix(prefix) {
        Some(rest) => (true, rest.trim_start()),
        None => (false, value),
    }
}

fn parse_token(token: &str) -> Result<HcaToken, ParseHcaFilterError> {
    let mut parts = token.split(':').map(str::trim);
    let name = parts.next().unwrap_or_default();
    if name.is_empty() {
        return Err(ParseHcaFilterError::NoName { token: token.to_owned() });
    }
    let mut number = |part: &'static str| match parts.next() {
        None | Some("") => Ok(None),
        Some(value) => value.parse().map(Some).map_err(|_| ParseHcaFilterError::Number {
            token: token.to_owned(),
            part,
            value: value.to_owned(),
        }),
    };
    let (port, rail, plane) = (number("port")?, number("rail")?, number("plane")?);
    if parts.next().is_some() {
        return Err(ParseHcaFilterError::TooManyParts { token: token.to_owned() });
    }
    Ok(HcaToken { name: name.to_owned(), port, rail, plane })
}

impl fmt::Display for HcaFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.exclude {
            f.write_str("^")?;
        }
        if self.exact {
            f.write_str("=")?;
        }
        // An empty token keeps a first name that looks like a prefix from being read as one.
        if let Some(first) = self.tokens.first()
            && !self.exact
            && (first.name.starts_with('=') || !self.exclude && first.name.starts_with('^'))
        {
            f.write_str(",")?;
        }
        for (i, token) in self.tokens.iter().enumerate() {
            if i > 0 {
                f.write_str(",")?;
            }
            token.fmt(f)?;
        }
        Ok(())
    }
}

impl fmt::Display for HcaToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let numbers = [self.port, self.rail, self.plane];
        let last = numbers.iter().rposition(Option::is_some).map_or(0, |i| i + 1);
        f.write_str(&self.name)?;
        for number in &numbers[..last] {
            match number {
                Some(number) => write!(f, ":{number}")?,
                None => f.write_str(":")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_documented_form() {
        let seen =
            [("mlx5_0", 1), ("mlx5_1", 1), ("mlx5_10", 1), ("mlx5_3", 1), ("mlx5_3", 2), ("mlx4_0", 1)];
        let taken = |value: &str| {
            let filter: HcaFilter = value.parse().unwrap();
            let taken: Vec<String> =
                seen.iter().filter(|(d, p)| filter.takes(d, *p)).map(|(d, p)| format!("{d}:{p}")).collect();
            taken.join(" ")
        };
        let all = "mlx5_0:1 mlx5_1:1 mlx5_10:1 mlx5_3:1 mlx5_3:2 mlx4_0:1";
        for (value, expected) in [
            ("", all),
            ("^", ""),
            ("=", all),
            ("^=", ""),
            (",,", all),
            ("mlx5", "mlx5_0:1 mlx5_1:1 mlx5_10:1 mlx5_3:1 mlx5_3:2"),
            ("mlx5_1", "mlx5_1:1 mlx5_10:1"),
            ("=mlx5_1", "mlx5_1:1"),
            ("=mlx5_0,mlx5_1", "mlx5_0:1 mlx5_1:1"),
            (" = mlx5_0 , mlx5_1 ", "mlx5_0:1 mlx5_1:1"),
            ("^=mlx5_3,mlx5_0", "mlx5_1:1 mlx5_10:1 mlx4_0:1"),
            ("^mlx5", "mlx4_0:1"),
            ("mlx5_0:1,mlx5_1:1", "mlx5_0:1 mlx5_1:1 mlx5_10:1"),
            ("mlx5_3:2", "mlx5_3:2"),
            ("^=mlx5_3:2", "mlx5_0:1 mlx5_1:1 mlx5_10:1 mlx5_3:1 mlx4_0:1"),
            ("=mlx5_3:", "mlx5_3:1 mlx5_3:2"),
            ("=mlx5_3::4:5", "mlx5_3:1 mlx5_3:2"),
            ("=^mlx5_0", ""),
            ("=mlx5_7", ""),
        ] {
            assert_eq!(taken(value), expected, "{value:?}");
        }
    }

    #[test]
    fn bad_values_say_which_part() {
        for (value, part) in [
            ("mlx5_0:x", "port `x` is not a number"),
            ("mlx5_0:1:2:-3", "plane `-3` is not a number"),
            (":1", "no device name"),
            ("a:1:2:3:4", "more than name:port:rail:plane"),
            ("a:99999999999", "port `99999999999`"),
        ] {
            let error = value.parse::<HcaFilter>().unwrap_err().to_string();
            assert!(error.contains(part), "{value:?}: {error}");
        }
    }

    #[test]
    fn a_name_that_looks_like_a_prefix_stays_a_name() {
        for value in [",^x", ",=x", "^,=x", "=^x", "^=^x", "^^x", ",^", "=="] {
            let filter: HcaFilter = value.parse().unwrap();
            assert_eq!(filter.to_string().parse::<HcaFilter>().unwrap(), filter, "{value:?}");
        }
    }

    proptest! {
        #[test]
        fn display_round_trips(exclude: bool, exact: bool,
            tokens in prop::collection::vec(("[a-z][a-z0-9_]{0,8}", any::<[Option<u32>; 3]>()), 0..5)) {
            let tokens = tokens.into_iter()
                .map(|(name, [port, rail, plane])| HcaToken { name, port, rail, plane }).collect();
            let filter = HcaFilter { exclude, exact, tokens };
            prop_assert_eq!(filter.to_string().parse::<HcaFilter>().unwrap(), filter);
        }

        #[test]
        fn any_text_is_a_filter_or_an_error(value in ".*") {
            if let Ok(filter) = value.parse::<HcaFilter>() {
                let printed = filter.to_string();
                for device in ["mlx5_0", "bnxt_re1"] {
                    prop_assert_eq!(printed.parse::<HcaFilter>().unwrap().takes(device, 1), filter.takes(device, 1));
                }
            }
        }
    }
}
