//! Where the hub listens.

use std::{fmt, net::IpAddr, net::SocketAddr, str::FromStr};

use crate::error::{Error, ErrorKind, Result};

/// A host name or address and a port. Names are resolved each time they are used.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HubAddress {
    /// Host name, IPv4 or IPv6 address, without brackets.
    pub host: String,
    /// Port; 0 lets the system choose one, which only makes sense in one process.
    pub port: u16,
}

impl HubAddress {
    /// `host` may have the brackets of an IPv6 address in a URL.
    pub fn new(host: &str, port: u16) -> Self {
        let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
        Self { host: host.to_owned(), port }
    }

    /// Whether this name means this host for every process: `localhost` or a loopback address.
    pub fn is_loopback(&self) -> bool {
        self.host.eq_ignore_ascii_case("localhost")
            || self.host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
    }

    /// Every address that the name stands for, IPv4 first.
    pub(crate) async fn resolve(&self) -> std::io::Result<Vec<SocketAddr>> {
        let mut addresses: Vec<_> = tokio::net::lookup_host((self.host.as_str(), self.port)).await?.collect();
        addresses.sort_by_key(SocketAddr::is_ipv6);
        addresses.dedup();
        Ok(addresses)
    }
}

impl From<SocketAddr> for HubAddress {
    fn from(address: SocketAddr) -> Self {
        Self { host: address.ip().to_string(), port: address.port() }
    }
}

impl fmt::Display for HubAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl FromStr for HubAddress {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parsed = text.rsplit_once(':').and_then(|(host, port)| {
            let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
            let good =
                bare.is_some_and(|h| !h.is_empty()) || (!host.is_empty() && !host.contains([':', '[', ']']));
            let port = port.parse().ok()?;
            good.then(|| Self::new(host, port))
        });
        parsed.ok_or_else(|| {
            Error::new(
                ErrorKind::ConfigInvalid,
                "read the hub's address",
                format!("{text:?} is not host:port (an IPv6 address goes in brackets)"),
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_parse_and_print() {
        for text in ["node1:29501", "10.0.0.1:80", "[::1]:29501", "[fe80::1%eth0]:1"] {
            assert_eq!(text.parse::<HubAddress>().unwrap().to_string(), text);
        }
        for text in ["", "node1", ":1", "node1:", "node1:x", "node1:65536", "::1:80", "[]:1", "[::1"] {
            assert!(text.parse::<HubAddress>().is_err(), "{text}");
        }
        assert_eq!(HubAddress::new("[::1]", 5), HubAddress::new("::1", 5));
        assert!(HubAddress::new("LOCALHOST", 1).is_loopback());
        assert!(HubAddress::new("127.0.0.9", 1).is_loopback());
        assert!(HubAddress::new("::1", 1).is_loopback());
        assert!(!HubAddress::new("10.0.0.1", 1).is_loopback());
    }
}
