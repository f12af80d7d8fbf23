//! Processes that outlive this one: each has a file with its pid and start time, so that a pid which the system gave to another
//! program is never mistaken for it, and a log.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use rustix::process::{Pid, Signal, kill_process};

/// How long a process may take to end before it is killed.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// A process by its pid and the time it started, in clock ticks since the machine's start.
#[derive(Clone, Copy, PartialEq)]
pub(super) struct Process {
    pub(super) pid: i32,
    started: u64,
}

impl Process {
    /// The process that has `pid` now, unless it is gone or a zombie.
    pub(super) fn of(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The command's name is in parentheses and may hold blanks; proc_pid_stat(5) numbers the fields.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let (state, started) = (fields.first()?, fields.get(19)?.parse().ok()?);
        (!matches!(*state, "Z" | "X")).then_some(Self { pid, started })
    }

    pub(super) fn is_alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }

    /// Memory that is the process's own and resident, in bytes.
    pub(super) fn memory_bytes(self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap_or_default();
        let field = |name: &str| -> u64 {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
        };
        field("RssAnon:") * 1024
    }

    fn signal(self, signal: Signal) {
        if self.is_alive()
            && let Some(pid) = Pid::from_raw(self.pid)
        {
            // The process may end between the check and the signal; that is what was wanted.
            let _ = kill_process(pid, signal);
        }
    }

    /// Asks the processes to end, kills those that do not within [`STOP_TIMEOUT`], and waits until they are gone.
    pub(super) fn stop(processes: &[Self]) {
        processes.iter().for_each(|process| process.signal(Signal::TERM));
        if !wait_gone(processes, STOP_TIMEOUT) {
            Self::kill(processes);
        }
    }

    /// Kills the processes and waits until they are gone.
    pub(super) fn kill(processes: &[Self]) {
        processes.iter().for_each(|process| process.signal(Signal::KILL));
        wait_gone(processes, STOP_TIMEOUT);
    }
}

fn wait_gone(processes: &[Process], timeout: Duration) -> bool {
    let deadline = Instant::now() + timeout;
    while processes.iter().any(|process| process.is_alive()) {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    true
}

/// The pid files and logs of one cluster.
pub(super) struct Supervisor {
    folder: PathBuf,
}

impl Supervisor {
    pub(super) fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    pub(super) fn log(&self, name: &str) -> PathBuf {
        self.folder.join("log").join(format!("{name}.log"))
    }

    fn pid_file(&self, name: &str) -> PathBuf {
        self.folder.join("pid").join(name)
    }

    /// Whether `name` was started and not stopped since; it may have died.
    pub(super) fn was_started(&self, name: &str) -> bool {
        self.pid_file(name).exists()
    }

    /// The process of `name`, if it lives.
    pub(super) fn find(&self, name: &str) -> Option<Process> {
        let text = fs::read_to_string(self.pid_file(name)).ok()?;
        let (pid, started) = text.split_once(' ')?;
        let process = Process {
            pid: pid.parse().ok()?,
            started: started.trim().parse().ok()?,
        };
        process.is_alive().then_some(process)
    }

    /// Starts `command` in a session of its own, unless `name` already runs.
    ///
    /// # Errors
    /// Where the program cannot be started or its files cannot be written.
    pub(super) fn start(&self, name: &str, command: &Command) -> Result<()> {
        if self.find(name).is_some() {
            return Ok(());
        }
        for file in [self.log(name), self.pid_file(name)] {
            fs::create_dir_all(file.parent().expect("a file in a folder"))?;
        }
        let log = File::options().create(true).append(true).open(self.log(name))?;
        // setsid: the end of the terminal's session must not end the cluster.
        let mut detached = Command::new("setsid");
        detached
            .arg(command.get_program())
            .args(command.get_args())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        for (key, value) in command.get_envs() {
            match value {
                Some(value) => detached.env(key, value),
                None => detached.env_remove(key),
            };
        }
        if let Some(folder) = command.get_current_dir() {
            detached.current_dir(folder);
        }
        let child = detached
            .spawn()
            .with_context(|| format!("cannot start {name}: is `setsid` (util-linux) installed?"))?;
        let pid = i32::try_from(child.id())?;
        let started = Process::of(pid).map_or(0, |process| process.started);
        fs::write(self.pid_file(name), format!("{pid} {started}\n"))?;
        Ok(())
    }

    /// Ends those of `names` that run, all at once.
    pub(super) fn stop(&self, names: &[&str]) {
        let processes: Vec<Process> = names.iter().filter_map(|name| self.find(name)).collect();
        Process::stop(&processes);
        for name in names {
            let _ = fs::remove_file(self.pid_file(name));
        }
    }

    /// The last `lines` lines of a log.
    pub(super) fn tail(&self, name: &str, lines: usize) -> String {
        let bytes = fs::read(self.log(name)).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_started_program_is_found_and_stopped() {
        let folder = tempfile::tempdir().unwrap();
        let supervisor = Supervisor::new(folder.path());
        let mut command = Command::new("sh");
        command.args(["-c", "echo begun; exec sleep 600"]);
        supervisor.start("sleeper", &command).unwrap();
        let first = supervisor.find("sleeper").expect("it runs").pid;
        supervisor.start("sleeper", &command).unwrap();
        assert_eq!(
            supervisor.find("sleeper").map(|process| process.pid),
            Some(first),
            "a second start leaves the first process alone"
        );
        while supervisor.tail("sleeper", 1) != "begun" {
            std::thread::sleep(Duration::from_millis(5));
        }
        supervisor.stop(&["sleeper"]);
        assert!(supervisor.find("sleeper").is_none());
        assert!(!supervisor.was_started("sleeper"));
    }

    #[test]
    fn a_pid_that_another_program_has_now_is_not_ours() {
        let folder = tempfile::tempdir().unwrap();
        let supervisor = Supervisor::new(folder.path());
        fs::create_dir_all(folder.path().join("pid")).unwrap();
        fs::write(folder.path().join("pid/reused"), format!("{} 1\n", std::process::id())).unwrap();
        assert!(supervisor.find("reused").is_none());
        assert!(supervisor.was_started("reused"), "so that `status` can say that it died");
    }
}
