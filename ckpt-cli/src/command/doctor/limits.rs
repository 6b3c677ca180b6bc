//! The system's limits.

use std::{fs, path::Path};

use ckpt_core::device::runtime_dir;
use rustix::process::{Resource, getrlimit};

use super::Finding;
use crate::output::format_bytes;

const AREA: &str = "limits";

pub(super) fn look() -> Vec<Finding> {
    let read = |path: &str| fs::read_to_string(path).ok();
    vec![
        kernel(),
        runtime_folder(),
        shared_memory(),
        memory_lock(Path::new("/sys/class/infiniband").exists(), getrlimit(Resource::Memlock).current),
        open_files(getrlimit(Resource::Nofile).current),
        processes(getrlimit(Resource::Nproc).current),
        huge_pages(read("/sys/kernel/mm/transparent_hugepage/enabled").as_deref()),
        ptrace_scope(read("/proc/sys/kernel/yama/ptrace_scope").as_deref()),
    ]
}

fn kernel() -> Finding {
    let name = rustix::system::uname();
    let detail = format!(
        "{} {} {} on {}",
        name.sysname().to_string_lossy(),
        name.release().to_string_lossy(),
        name.machine().to_string_lossy(),
        name.nodename().to_string_lossy()
    );
    match cfg!(target_os = "linux") {
        true => Finding::ok(AREA, "kernel", detail),
        false => Finding::warning(AREA, "kernel", detail, "only Linux is tested"),
    }
}

/// Sockets and shared-memory files go there; nothing works without it.
fn runtime_folder() -> Finding {
    match runtime_dir() {
        Ok(path) => Finding::ok(AREA, "runtime folder", path.display().to_string()),
        Err(error) => {
            let fix = "set CKPT_RUNTIME_DIR to a folder of yours that others cannot write";
            Finding::error(AREA, "runtime folder", error.to_string(), fix)
        }
    }
}

/// Checkpoints that trainers leave in /dev/shm are registered in place; a container's default is 64 MiB.
fn shared_memory() -> Finding {
    let name = "/dev/shm";
    match rustix::fs::statvfs(name) {
        Ok(stat) => {
            let total = stat.f_blocks.saturating_mul(stat.f_frsize);
            let free = stat.f_bavail.saturating_mul(stat.f_frsize);
            let detail = format!("{} of {} free", format_bytes(free), format_bytes(total));
            if total < 1 << 30 {
                let fix = "containers need --shm-size or --ipc=host to hold a checkpoint there";
                Finding::warning(AREA, name, detail, fix)
            } else {
                Finding::ok(AREA, name, detail)
            }
        }
        Err(error) => Finding::warning(AREA, name, format!("cannot be read: {error}"), "mount a tmpfs there"),
    }
}

/// RDMA registration and pinning lock memory.
fn memory_lock(rdma: bool, limit: Option<u64>) -> Finding {
    match limit {
        None => Finding::ok(AREA, "memlock", "unlimited"),
        Some(limit) if rdma => {
            let fix = "RDMA needs more: `ulimit -l unlimited`, or docker's --ulimit memlock=-1";
            Finding::warning(AREA, "memlock", format_bytes(limit), fix)
        }
        Some(limit) => {
            Finding::ok(AREA, "memlock", format!("{} (only RDMA needs more)", format_bytes(limit)))
        }
    }
}

/// A rank holds a few connections to every other.
fn open_files(limit: Option<u64>) -> Finding {
    let used = fs::read_dir("/proc/self/fd").map(Iterator::count).unwrap_or(0);
    match limit {
        Some(limit) if limit < 1024 => {
            Finding::warning(AREA, "open files", limit.to_string(), "large jobs need more: `ulimit -n 65536`")
        }
        Some(limit) => Finding::ok(AREA, "open files", format!("{limit} allowed, {used} in use")),
        None => Finding::ok(AREA, "open files", "unlimited"),
    }
}

/// Threads count here.
fn processes(limit: Option<u64>) -> Finding {
    match limit {
        Some(limit) if limit < 4096 => {
            let fix = "a rank has some dozen threads: `ulimit -u 65536`";
            Finding::warning(AREA, "threads", limit.to_string(), fix)
        }
        Some(limit) => Finding::ok(AREA, "threads", format!("{limit} allowed")),
        None => Finding::ok(AREA, "threads", "unlimited"),
    }
}

/// Pinning and the first touch of large memory are quicker with them.
fn huge_pages(enabled: Option<&str>) -> Finding {
    let Some(text) = enabled else {
        return Finding::ok(AREA, "transparent huge pages", "this kernel has none");
    };
    let chosen = text.split_whitespace().find_map(|word| word.strip_prefix('[')?.strip_suffix(']'));
    match chosen {
        Some("never") => {
            let fix = "first touches take longer: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled";
            Finding::warning(AREA, "transparent huge pages", "never", fix)
        }
        other => Finding::ok(AREA, "transparent huge pages", other.unwrap_or("unknown")),
    }
}

/// Who may look into another process's memory; CUDA's sharing of memory between processes asks the same question.
fn ptrace_scope(scope: Option<&str>) -> Finding {
    match scope.map(str::trim) {
        None => Finding::ok(AREA, "ptrace scope", "not restricted"),
        Some(scope @ ("0" | "1")) => Finding::ok(AREA, "ptrace scope", scope),
        Some(scope) => {
            let fix = "memory shared between server and worker may be refused, and debuggers are: sysctl kernel.yama.ptrace_scope=1, or the capability SYS_PTRACE";
            Finding::warning(AREA, "ptrace scope", scope, fix)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::doctor::Verdict;

    #[test]
    fn bad_limits_have_a_fix_and_good_ones_none() {
        let bad = [
            memory_lock(true, Some(64 << 10)),
            open_files(Some(256)),
            processes(Some(100)),
            huge_pages(Some("always madvise [never]")),
            ptrace_scope(Some("2\n")),
        ];
        for finding in bad {
            assert!(finding.verdict == Verdict::Warning && finding.fix.is_some(), "{finding:?}");
        }
        let good = [
            memory_lock(false, Some(64 << 10)),
            memory_lock(true, None),
            open_files(Some(65_536)),
            processes(None),
            huge_pages(Some("always [madvise] never")),
            huge_pages(None),
            ptrace_scope(Some("1")),
            ptrace_scope(None),
        ];
        for finding in good {
            assert!(finding.verdict == Verdict::Ok && finding.fix.is_none(), "{finding:?}");
        }
    }
}
