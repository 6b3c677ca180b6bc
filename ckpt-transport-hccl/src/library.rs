//! Opening `libascendcl.so` and `libhccl.so` at run time.

use std::{fmt, path::PathBuf};

use ckpt_core::{
    Result,
    transport::library::{LibrarySearch, Opened, loader_reason},
};

use crate::config::HcclConfig;

const REMEDY: &str = "install Huawei's CANN toolkit and source its set_env.sh";

/// Libraries that were opened.
pub(crate) struct Found(Vec<(&'static str, Opened<libloading::Library>)>);

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let each: Vec<String> =
            self.0.iter().map(|(name, opened)| format!("{name} ({})", opened.path.display())).collect();
        f.write_str(&each.join(" and "))
    }
}

/// Opens the ACL runtime.
pub(crate) fn find_acl(config: &HcclConfig) -> Result<Found> {
    Ok(Found(vec![open(
        config,
        "ACL",
        "CANN's ACL runtime",
        &["libascendcl.so"],
        config.folder.clone(),
        "aclInit",
    )?]))
}

/// Opens the ACL runtime, without which HCCL cannot work, and HCCL.
pub(crate) fn find_hccl(config: &HcclConfig) -> Result<Found> {
    let mut found = find_acl(config)?;
    let chosen = config.folder.clone().or_else(|| config.hccl.clone());
    found.0.push(open(config, "HCCL", "CANN's HCCL", &["libhccl.so"], chosen, "HcclBroadcast")?);
    Ok(found)
}

fn open(
    config: &HcclConfig,
    label: &'static str,
    product: &'static str,
    names: &'static [&'static str],
    chosen: Option<PathBuf>,
    symbol: &'static str,
) -> Result<(&'static str, Opened<libloading::Library>)> {
    let search = LibrarySearch {
        product,
        names,
        chosen,
        variable: "CKPT_ASCEND_LIBRARY_DIR",
        folders: config.folders.clone(),
        remedy: REMEDY,
    };
    let opened = search.open(|name| {
        // SAFETY: loading runs the library's initialisers. The user or the system chose this file as CANN's; nothing
        // is called in it before aclInit.
        let library = unsafe { libloading::Library::new(name) }.map_err(|error| loader_reason(&error))?;
        // SAFETY: the address is only compared with null by libloading; nothing is called or read through it.
        let present = unsafe { library.get::<*const ()>(symbol.as_bytes()) }.is_ok();
        if present { Ok(library) } else { Err(format!("{symbol} is missing in it")) }
    })?;
    Ok((label, opened))
}
