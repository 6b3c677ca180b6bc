//! RDMA devices as the kernel lists them; no library is needed to read this.

use std::{fmt, fs, path::Path};

/// One port of one HCA.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// The HCA, `mlx5_0`.
    pub hca: String,
    /// The port's number, from 1.
    pub port: u32,
    /// `ACTIVE`, `DOWN`, ...
    pub state: String,
    /// `InfiniBand` or `Ethernet`.
    pub link_layer: String,
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{} ({}, {})", self.hca, self.port, self.state, self.link_layer)
    }
}

/// The ports of all HCAs of this machine, by name and number.
pub fn ports() -> Vec<Port> {
    ports_in(Path::new("/sys/class/infiniband"))
}

fn ports_in(class: &Path) -> Vec<Port> {
    let mut found = Vec::new();
    for hca in names(class) {
        for port in names(&class.join(&hca).join("ports")) {
            let Ok(number) = port.parse() else { continue };
            let folder = class.join(&hca).join("ports").join(&port);
            let read =
                |file: &str| fs::read_to_string(folder.join(file)).unwrap_or_default().trim().to_owned();
            // The file says "4: ACTIVE".
            let state = read("state");
            let state = state.rsplit(": ").next().unwrap_or_default().to_owned();
            found.push(Port { hca: hca.clone(), port: number, state, link_layer: read("link_layer") });
        }
    }
    found
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read_from_a_class_folder() {
        let class = tempfile::tempdir().unwrap();
        let port = class.path().join("mlx5_0/ports/1");
        fs::create_dir_all(&port).unwrap();
        fs::write(port.join("state"), "4: ACTIVE\n").unwrap();
        fs::write(port.join("link_layer"), "InfiniBand\n").unwrap();
        let found = ports_in(class.path());
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].to_string(), "mlx5_0:1 (ACTIVE, InfiniBand)");
        assert!(ports_in(&class.path().join("absent")).is_empty());
    }
}
