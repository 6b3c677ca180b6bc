//! What stands in the way of an inference worker and a parameter server on one NPU: versions, ports, white lists. For
//! `ckpt doctor`. `docs/ascend.md` explains each.

use std::{fs, ops::RangeInclusive, path::PathBuf};

use crate::config::HcclConfig;

/// The device port that HCCL and HIXL both take if nobody says otherwise.
const DEFAULT_DEVICE_PORT: u64 = 16666;

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What was looked at.
    pub name: &'static str,
    /// Whether it is as it must be.
    pub good: bool,
    /// What was found, and what to do.
    pub detail: String,
}

fn good(name: &'static str, detail: impl Into<String>) -> Finding {
    Finding { name, good: true, detail: detail.into() }
}

fn bad(name: &'static str, detail: impl Into<String>) -> Finding {
    Finding { name, good: false, detail: detail.into() }
}

/// Looks at the environment; empty on a machine without NPUs and without the libraries.
pub fn look(env: &dyn Fn(&str) -> Option<String>) -> Vec<Finding> {
    let variable = |name: &str| env(name).filter(|value| !value.trim().is_empty());
    let chosen = variable("CKPT_ASCEND_LIBRARY_DIR").or_else(|| variable("ASCEND_HOME_PATH"));
    if HcclConfig::devices().is_empty() && chosen.is_none() {
        return Vec::new();
    }
    look_at(&variable, &|path| fs::read_to_string(path).ok())
}

fn look_at(variable: &dyn Fn(&str) -> Option<String>, read: &dyn Fn(&str) -> Option<String>) -> Vec<Finding> {
    vec![
        driver_version(read),
        toolkit_version(variable, read),
        rank_table(variable, read),
        port_range("HCCL_HOST_SOCKET_PORT_RANGE", variable),
        port_range("HCCL_NPU_SOCKET_PORT_RANGE", variable),
        base_port(variable),
        connect_timeout(variable),
        white_list(variable, read),
        intra_roce(variable),
        visible_devices(variable),
    ]
}

/// `25.3` of `Version=25.3.rc1`.
fn version_in(text: &str) -> Option<(u32, u32)> {
    let after = text.lines().find_map(|line| {
        let (key, value) = line.split_once('=')?;
        key.trim().to_ascii_lowercase().ends_with("version").then_some(value)
    })?;
    let digits = after.trim_start_matches(|c: char| !c.is_ascii_digit());
    let mut parts = digits.split('.');
    let mut number = || {
        let part = parts.next()?;
        part.chars().take_while(char::is_ascii_digit).collect::<String>().parse().ok()
    };
    Some((number()?, number()?))
}

fn version_finding(
    name: &'static str,
    wanted: (u32, u32),
    wanted_text: &str,
    text: Option<String>,
    why: &str,
) -> Finding {
    match text.as_deref().and_then(version_in) {
        Some(found) if found >= wanted => good(name, format!("{}.{}", found.0, found.1)),
        Some((major, minor)) => bad(name, format!("{major}.{minor}; {why} needs {wanted_text} or newer")),
        None => good(name, format!("not found; {why} needs {wanted_text} or newer")),
    }
}

/// The kit of driver and firmware.
fn driver_version(read: &dyn Fn(&str) -> Option<String>) -> Finding {
    let text = read("/usr/local/Ascend/driver/version.info");
    version_finding("Ascend HDK", (25, 3), "25.3.rc1", text, "memory shared between processes")
}

fn toolkit_version(
    variable: &dyn Fn(&str) -> Option<String>,
    read: &dyn Fn(&str) -> Option<String>,
) -> Finding {
    let home =
        variable("ASCEND_HOME_PATH").unwrap_or_else(|| "/usr/local/Ascend/ascend-toolkit/latest".to_owned());
    let path = |file: &str| PathBuf::from(&home).join(file).to_string_lossy().into_owned();
    let text = read(&path("version.cfg")).or_else(|| read(&path("version.info")));
    version_finding("Ascend CANN", (8, 3), "8.3.RC1", text, "memory shared between processes")
}

/// HCCL's own device port is fixed in the engine, so the engine's table must name another for what it listens on.
fn rank_table(variable: &dyn Fn(&str) -> Option<String>, read: &dyn Fn(&str) -> Option<String>) -> Finding {
    let name = "RANK_TABLE_FILE";
    let Some(path) = variable(name) else {
        return bad(
            name,
            format!(
                "not set here; beside a parameter server the engine needs one whose device_port is not \
                 {DEFAULT_DEVICE_PORT}, which HCCL and HIXL both take"
            ),
        );
    };
    let Some(text) = read(&path) else { return bad(name, format!("{path} cannot be read")) };
    let Ok(table) = serde_json::from_str::<serde_json::Value>(&text) else {
        return bad(name, format!("{path} is not JSON"));
    };
    let mut ports = Vec::new();
    device_ports(&table, &mut ports);
    if ports.is_empty() {
        bad(name, format!("{path} names no device_port, so {DEFAULT_DEVICE_PORT} is taken twice"))
    } else if ports.contains(&DEFAULT_DEVICE_PORT) {
        bad(
            name,
            format!("{path} names device_port {DEFAULT_DEVICE_PORT}, HCCL's own default; choose another"),
        )
    } else {
        good(name, format!("{path}: {} device ports, none of them {DEFAULT_DEVICE_PORT}", ports.len()))
    }
}

/// Every `device_port` in a rank table, as number or text, wherever its version puts it.
fn device_ports(value: &serde_json::Value, into: &mut Vec<u64>) {
    match value {
        serde_json::Value::Array(values) => values.iter().for_each(|value| device_ports(value, into)),
        serde_json::Value::Object(fields) => {
            for (key, value) in fields {
                let port = value.as_u64().or_else(|| value.as_str()?.trim().parse().ok());
                match port {
                    Some(port) if key == "device_port" => into.push(port),
                    _ => device_ports(value, into),
                }
            }
        }
        _ => {}
    }
}

/// `60000-60050`, `60000,60001-60010`, `auto`.
fn parse_ports(text: &str) -> Option<Vec<RangeInclusive<u16>>> {
    let part = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.trim().parse::<u16>().ok()?, last.trim().parse::<u16>().ok()?);
        (first >= 1024 && first <= last).then_some(first..=last)
    };
    text.split(',').map(part).collect()
}

fn port_range(name: &'static str, variable: &dyn Fn(&str) -> Option<String>) -> Finding {
    let example = "`60000-60050` or `auto`";
    match variable(name) {
        None => bad(
            name,
            format!("not set; two processes on one NPU need it, on the engine's side too: {example}"),
        ),
        Some(text) if text.trim() == "auto" => good(name, "auto"),
        Some(text) => match parse_ports(&text) {
            Some(ranges) => {
                let ports: usize = ranges.iter().map(RangeInclusive::len).sum();
                good(name, format!("{text} ({ports} ports)"))
            }
            None => bad(name, format!("{text} is no list of ports above 1023; write {example}")),
        },
    }
}

fn base_port(variable: &dyn Fn(&str) -> Option<String>) -> Finding {
    let name = "HCCL_IF_BASE_PORT";
    match variable(name).map(|text| (text.trim().parse::<u32>(), text)) {
        None => good(name, "not set: 60000 and the ports behind it, unless a range above replaces it"),
        Some((Ok(port), _)) if (1024..=65520).contains(&port) => good(name, port.to_string()),
        Some((_, text)) => bad(name, format!("{text} is not between 1024 and 65520")),
    }
}

fn connect_timeout(variable: &dyn Fn(&str) -> Option<String>) -> Finding {
    let name = "HCCL_CONNECT_TIMEOUT";
    match variable(name).map(|text| (text.trim().parse::<u32>(), text)) {
        None => good(name, "not set: HCCL gives an incomplete group up after 120 s and 20 s more"),
        Some((Ok(seconds), _)) if (120..=7200).contains(&seconds) => good(name, format!("{seconds} s")),
        Some((_, text)) => bad(name, format!("{text} is not between 120 and 7200")),
    }
}

fn white_list(variable: &dyn Fn(&str) -> Option<String>, read: &dyn Fn(&str) -> Option<String>) -> Finding {
    let name = "HCCL_WHITELIST_DISABLE";
    if variable(name).is_none_or(|text| text.trim() == "1") {
        return good(name, "the white list is off; Ascend 950 wants it on: 0, and HCCL_WHITELIST_FILE");
    }
    match variable("HCCL_WHITELIST_FILE") {
        None => bad(name, "the white list is on, but HCCL_WHITELIST_FILE names no file"),
        Some(path) if read(&path).is_none() => bad(name, format!("the white list {path} cannot be read")),
        Some(path) => good(name, format!("on, {path}")),
    }
}

fn intra_roce(variable: &dyn Fn(&str) -> Option<String>) -> Finding {
    let name = "HCCL_INTRA_ROCE_ENABLE";
    match variable(name) {
        Some(value) if value.trim() == "1" => {
            good(name, "1: RDMA between NPUs of one host (CANN 8.5 or newer)")
        }
        _ => good(name, "not 1; reads between NPUs of one host by RDMA need it (CANN 8.5 or newer)"),
    }
}

fn visible_devices(variable: &dyn Fn(&str) -> Option<String>) -> Finding {
    let name = "ASCEND_RT_VISIBLE_DEVICES";
    match variable(name) {
        None => good(name, "not set: all NPUs"),
        Some(list) if list.split(',').all(|n| n.trim().parse::<u32>().is_ok()) => good(name, list),
        Some(list) => bad(name, format!("{list} is no list of numbers like 0,1,2")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(name: &str, variables: &[(&str, &str)], files: &[(&str, &str)]) -> (bool, String) {
        let lookup = |table: &[(&str, &str)], key: &str| {
            table.iter().find(|(name, _)| *name == key).map(|(_, value)| (*value).to_owned())
        };
        let all = look_at(&|name| lookup(variables, name), &|path| lookup(files, path));
        let found = all.into_iter().find(|finding| finding.name == name).unwrap();
        (found.good, found.detail)
    }

    #[test]
    fn versions_are_compared() {
        let driver = |text| finding("Ascend HDK", &[], &[("/usr/local/Ascend/driver/version.info", text)]);
        assert_eq!(driver("Version=25.3.rc1\n"), (true, "25.3".to_owned()));
        let (good, detail) = driver("package_version=24.1.0\nVersion=24.1.0");
        assert!(!good && detail.contains("24.1") && detail.contains("25.3.rc1"), "{detail}");
        let home = [("ASCEND_HOME_PATH", "/opt/cann")];
        let cann = |text| finding("Ascend CANN", &home, &[("/opt/cann/version.cfg", text)]).0;
        assert!(cann("runtime_running_version=[8.5.0.1:8.5.0]"));
        assert!(!cann("runtime_running_version=[8.2.RC1:8.2.RC1]"));
    }

    #[test]
    fn the_rank_table_must_name_another_device_port() {
        let with = |text: &str| finding("RANK_TABLE_FILE", &[("RANK_TABLE_FILE", "/t")], &[("/t", text)]).0;
        assert!(!finding("RANK_TABLE_FILE", &[], &[]).0);
        assert!(!finding("RANK_TABLE_FILE", &[("RANK_TABLE_FILE", "/t")], &[]).0);
        assert!(with(r#"{"server_list":[{"device":[{"device_id":"0","device_port":"16667"}]}]}"#));
        assert!(!with(r#"{"server_list":[{"device":[{"device_port":16666}]}]}"#));
        assert!(!with(r#"{"server_list":[{"device":[{"device_id":"0"}]}]}"#));
        assert!(!with("nonsense"));
    }

    #[test]
    fn ports_and_times_have_their_ranges() {
        let range =
            |text| finding("HCCL_NPU_SOCKET_PORT_RANGE", &[("HCCL_NPU_SOCKET_PORT_RANGE", text)], &[]);
        assert!(!finding("HCCL_HOST_SOCKET_PORT_RANGE", &[], &[]).0);
        assert_eq!(range("auto"), (true, "auto".to_owned()));
        assert!(range("61000-61050,61060").1.contains("52 ports"));
        for wrong in ["61050-61000", "80-90", "many", "61000-"] {
            assert!(!range(wrong).0, "{wrong}");
        }
        assert!(!finding("HCCL_IF_BASE_PORT", &[("HCCL_IF_BASE_PORT", "65530")], &[]).0);
        assert!(!finding("HCCL_CONNECT_TIMEOUT", &[("HCCL_CONNECT_TIMEOUT", "60")], &[]).0);
        assert!(finding("HCCL_CONNECT_TIMEOUT", &[("HCCL_CONNECT_TIMEOUT", "600")], &[]).0);
    }

    #[test]
    fn a_white_list_that_is_on_needs_its_file() {
        let on = ("HCCL_WHITELIST_DISABLE", "0");
        assert!(finding("HCCL_WHITELIST_DISABLE", &[], &[]).0);
        assert!(!finding("HCCL_WHITELIST_DISABLE", &[on], &[]).0);
        let file = ("HCCL_WHITELIST_FILE", "/w");
        assert!(!finding("HCCL_WHITELIST_DISABLE", &[on, file], &[]).0);
        assert!(finding("HCCL_WHITELIST_DISABLE", &[on, file], &[("/w", "{}")]).0);
        assert!(!finding("ASCEND_RT_VISIBLE_DEVICES", &[("ASCEND_RT_VISIBLE_DEVICES", "0,x")], &[]).0);
    }
}
