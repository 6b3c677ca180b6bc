//! A machine's RDMA and PCI tree as one text file, so that other people's machines become tests.
//!
//! One line an entry, sorted: `path = content` is a file, `path -> target` a link. Paths are relative to the sysfs root.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Component, Path},
};

use super::sysfs::names;
use crate::error::{Error, ErrorKind, Key, Result};

/// The part of the tree below `sysfs` that the choice of an RDMA device looks at. `accelerators` are PCI addresses.
pub fn record(sysfs: &Path, accelerators: &[String]) -> io::Result<String> {
    let mut entries = BTreeMap::new();
    let root = fs::canonicalize(sysfs)?;
    for name in names(&root.join("class/infiniband")) {
        let link = format!("class/infiniband/{name}");
        let real = follow(&root, &link, &mut entries)?;
        for port in names(&root.join(&real).join("ports")) {
            let port = format!("{real}/ports/{port}");
            for file in ["state", "link_layer", "rate", "lid"] {
                keep(&root, format!("{port}/{file}"), &mut entries);
            }
            for table in ["gids", "gid_attrs/types", "gid_attrs/ndevs"] {
                for index in names(&root.join(&port).join(table)) {
                    keep(&root, format!("{port}/{table}/{index}"), &mut entries);
                }
            }
        }
        let device = format!("{real}/device");
        if root.join(&device).exists() {
            let device = follow(&root, &device, &mut entries)?;
            keep(&root, format!("{device}/numa_node"), &mut entries);
        }
    }
    for file in names(&root.join("class/infiniband_verbs")) {
        if file.starts_with("uverbs") {
            let real = follow(&root, &format!("class/infiniband_verbs/{file}"), &mut entries)?;
            keep(&root, format!("{real}/ibdev"), &mut entries);
        }
    }
    for address in accelerators {
        let link = format!("bus/pci/devices/{}", address.to_ascii_lowercase());
        if root.join(&link).exists() {
            let real = follow(&root, &link, &mut entries)?;
            for file in ["numa_node", "class", "vendor"] {
                keep(&root, format!("{real}/{file}"), &mut entries);
            }
        }
    }
    Ok(entries.into_iter().map(|(path, what)| format!("{path} {what}\n")).collect())
}

/// Notes the link `path`, and answers where it leads, both relative to `root`.
fn follow(root: &Path, path: &str, entries: &mut BTreeMap<String, String>) -> io::Result<String> {
    let real = fs::canonicalize(root.join(path))?;
    let outside = || io::Error::other(format!("{path} leads out of {}", root.display()));
    let real = real.strip_prefix(root).map_err(|_| outside())?.to_str().ok_or_else(outside)?.to_owned();
    if real != path {
        let up = "../".repeat(path.matches('/').count());
        entries.insert(path.to_owned(), format!("-> {up}{real}"));
    }
    Ok(real)
}

fn keep(root: &Path, path: String, entries: &mut BTreeMap<String, String>) {
    // Empty GIDs are most of a table, and their attributes cannot be read.
    if let Ok(text) = fs::read_to_string(root.join(&path)) {
        let text = text.trim();
        if !text.is_empty()
            && !text.contains('\n')
            && !text.starts_with("0000:0000:0000:0000:0000:0000:0000:0000")
        {
            entries.insert(path, format!("= {text}"));
        }
    }
}

/// Makes the tree that `text` describes below `folder`, which exists. Paths that lead out of it are refused.
pub fn unpack(text: &str, folder: &Path) -> Result<()> {
    for (number, line) in text.lines().enumerate() {
        let wrong = |why: &str| {
            Error::new(ErrorKind::Corrupt, "read a recorded tree", format!("line {}: {why}", number + 1))
        };
        let failed = |e: io::Error| wrong("cannot be made").with(Key::Path, folder.display()).caused_by(e);
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let mut parts = line.splitn(3, ' ');
        let (Some(path), Some(kind), Some(rest)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(wrong("is not `path = content` or `path -> target`"));
        };
        if !Path::new(path).components().all(|part| matches!(part, Component::Normal(_))) {
            return Err(wrong("the path leads out of the tree"));
        }
        let target = folder.join(path);
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent).map_err(failed)?;
        }
        match kind {
            "=" => fs::write(&target, format!("{rest}\n")).map_err(failed)?,
            "->" => {
                let depth = path.matches('/').count();
                let up = rest.split('/').take_while(|part| *part == "..").count();
                let below = rest.split('/').skip(up).collect::<Vec<_>>().join("/");
                let inside = Path::new(&below).components().all(|part| matches!(part, Component::Normal(_)));
                if rest.starts_with('/') || up > depth || !inside {
                    return Err(wrong("the link leads out of the tree"));
                }
                std::os::unix::fs::symlink(rest, &target).map_err(failed)?;
            }
            _ => return Err(wrong("is not `path = content` or `path -> target`")),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::read_hcas;

    const TWO_SOCKETS: &str = include_str!("fixtures/two_sockets.txt");

    #[test]
    fn a_recorded_tree_reads_as_the_machine_did() {
        let folder = tempfile::tempdir().unwrap();
        unpack(TWO_SOCKETS, folder.path()).unwrap();
        let accelerators = ["0000:1b:00.0".to_owned(), "0000:9d:00.0".to_owned()];
        let again = record(folder.path(), &accelerators).unwrap();
        let plain: Vec<&str> = TWO_SOCKETS.lines().filter(|line| !line.starts_with('#')).collect();
        assert_eq!(again.lines().collect::<Vec<_>>(), plain);
        let copy = tempfile::tempdir().unwrap();
        unpack(&again, copy.path()).unwrap();
        assert_eq!(read_hcas(copy.path()), read_hcas(folder.path()));
    }

    #[test]
    fn a_tree_stays_in_its_folder() {
        for line in [
            "/etc/x = 1",
            "../x = 1",
            "a/../../x = 1",
            "a -> /etc",
            "a -> ../b",
            "a/b -> ../../c",
            "a -> b/../../c",
            "a",
            "a ? b",
        ] {
            let folder = tempfile::tempdir().unwrap();
            assert_eq!(unpack(line, folder.path()).unwrap_err().kind(), ErrorKind::Corrupt, "{line}");
        }
    }
}
