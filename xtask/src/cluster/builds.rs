//! The cluster's programs: built from pinned Go modules once, kept in the user's cache under the hash of what they are made of.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use indicatif::ProgressBar;
use sha2::{Digest as _, Sha256};

use crate::progress::{Gauge, phase, run_gauged, run_logged};
use crate::workspace;

/// Kubernetes' version, as `tests/cluster/go.mod` requires it; the binaries say it of themselves.
const KUBERNETES: (&str, &str, &str) = ("v1.36.3", "1", "36");

/// One `go build`, whose binaries lie in one folder.
struct Build {
    /// The folder's name in the cache, and how progress calls it.
    name: &'static str,
    /// The module, below `tests/cluster`.
    module: &'static str,
    packages: &'static [&'static str],
    /// Folders of the module whose Go files are part of the build; packages of other modules are pinned by go.sum.
    sources: &'static [&'static str],
    binaries: &'static [&'static str],
}

/// Every program of the cluster, the slowest to build first.
const BUILDS: &[Build] = &[
    Build {
        name: "kubernetes",
        module: ".",
        packages: &["."],
        sources: &[".", "bootstrap"],
        binaries: &["cluster", "kubectl"],
    },
    Build {
        name: "containerd",
        module: "tools",
        packages: &[
            "github.com/containerd/containerd/v2/cmd/containerd",
            "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2",
            "github.com/containerd/containerd/v2/cmd/ctr",
        ],
        sources: &[],
        binaries: &["containerd", "containerd-shim-runc-v2", "ctr"],
    },
    Build {
        name: "coredns",
        module: "tools",
        packages: &["./coredns"],
        sources: &["coredns"],
        binaries: &["coredns"],
    },
    Build {
        name: "pause",
        module: ".",
        packages: &["./pause"],
        sources: &["pause"],
        binaries: &["pause"],
    },
    Build {
        name: "fixture-server",
        module: ".",
        packages: &["./fixture-server"],
        sources: &["fixture-server"],
        binaries: &["fixture-server"],
    },
    Build {
        name: "registry",
        module: "tools",
        packages: &["./registry"],
        sources: &["registry"],
        binaries: &["registry"],
    },
    Build {
        name: "helm",
        module: "tools",
        packages: &["helm.sh/helm/v4/cmd/helm"],
        sources: &[],
        binaries: &["helm"],
    },
    Build {
        name: "crane",
        module: "tools",
        packages: &["github.com/google/go-containerregistry/cmd/crane"],
        sources: &[],
        binaries: &["crane"],
    },
    Build {
        name: "kwok",
        module: "tools",
        packages: &["sigs.k8s.io/kwok/cmd/kwok"],
        sources: &[],
        binaries: &["kwok"],
    },
];

/// The file beside kwok that says how its nodes and pods go through their lives.
pub(super) const KWOK_STAGES: &str = "stages.yaml";

/// The path of the program `binary`, which is built first where the cache does not have it.
///
/// # Errors
/// Where `binary` is none of the cluster's programs, Go is missing, or the build fails.
pub(super) fn program(binary: &str) -> Result<PathBuf> {
    let Some(build) = BUILDS.iter().find(|build| build.binaries.contains(&binary)) else {
        let names: Vec<&str> = BUILDS.iter().flat_map(|build| build.binaries).copied().collect();
        bail!("there is no tool `{binary}`; there are {}", names.join(", "));
    };
    let folder = build.folder()?;
    if !folder.is_dir() {
        let _lock = super::lock("build")?;
        if !folder.is_dir() {
            phase(&format!("building {} (kept in {})", build.name, super::home().display()), |bar| {
                build.make(&folder, bar)
            })?;
        }
    }
    Ok(folder.join(binary))
}

/// Whether [`program`] would have to build `binary`.
pub(super) fn program_is_missing(binary: &str) -> bool {
    let build = BUILDS.iter().find(|build| build.binaries.contains(&binary));
    !build.is_some_and(|build| build.folder().is_ok_and(|folder| folder.is_dir()))
}

/// Removes what older checkouts built. To be called only while no cluster runs.
pub(super) fn prune() -> Result<()> {
    for build in BUILDS {
        let current = build.folder()?;
        for entry in fs::read_dir(super::home())?.filter_map(Result::ok) {
            let is_of_build = entry
                .file_name()
                .to_string_lossy()
                .strip_prefix(build.name)
                .is_some_and(|rest| rest.starts_with('-') && rest.len() == 17);
            if is_of_build && entry.path() != current {
                fs::remove_dir_all(entry.path())?;
            }
        }
    }
    Ok(())
}

impl Build {
    fn module(&self) -> PathBuf {
        workspace::root().join("tests/cluster").join(self.module)
    }

    /// Where the build lies in the cache: named by a hash over the module's pinned versions, the sources and the way of building.
    fn folder(&self) -> Result<PathBuf> {
        let mut hash = Sha256::new();
        let mut add = |name: &str, content: &[u8]| {
            hash.update(format!("{name} {}\n", content.len()));
            hash.update(content);
        };
        add("packages", self.packages.join(" ").as_bytes());
        add("flags", linker_flags().as_bytes());
        let module = self.module();
        for name in ["go.mod", "go.sum"] {
            add(
                name,
                &fs::read(module.join(name)).with_context(|| format!("cannot read {}", module.join(name).display()))?,
            );
        }
        for sources in self.sources.iter().map(|folder| module.join(folder)) {
            for file in go_files(&sources)? {
                add(&file.to_string_lossy(), &fs::read(sources.join(&file))?);
            }
        }
        Ok(super::home().join(format!("{}-{}", self.name, &hex::encode(hash.finalize())[..16])))
    }

    fn make(&self, folder: &Path, bar: &ProgressBar) -> Result<()> {
        let temporary = tempfile::Builder::new().prefix(".build-").tempdir_in(super::home())?;
        let log = |step: &str| super::home().join(format!("{step}-{}.log", self.name));
        // What it says beside the packages is what it downloads.
        let listed = log("list");
        run_logged(self.go(["list", "-deps"]).args(self.packages), &listed, bar)?;
        let packages = fs::read_to_string(&listed)?
            .lines()
            .filter(|line| !line.starts_with("go: "))
            .count();
        let mut command = self.go(["build", "-v", "-trimpath", "-ldflags", &linker_flags(), "-o"]);
        command.arg(format!("{}/", temporary.path().display())).args(self.packages);
        let gauge = Gauge::Lines {
            total: packages as u64,
            unit: "packages at most",
        };
        run_gauged(&mut command, &log("build"), bar, &gauge)?;
        match self.name {
            "kubernetes" => std::os::unix::fs::symlink("cluster", temporary.path().join("kubectl"))?,
            "kwok" => fs::write(temporary.path().join(KWOK_STAGES), self.kwok_stages()?)?,
            _ => {}
        }
        let built = temporary.keep();
        fs::set_permissions(&built, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        fs::rename(&built, folder).with_context(|| format!("cannot put {} in place", folder.display()))
    }

    fn go<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Command {
        let mut command = Command::new("go");
        command.current_dir(self.module()).args(arguments);
        // No C compiler is needed, go.mod and go.sum decide, and nothing of the checkout's state enters the binary.
        command
            .env("CGO_ENABLED", "0")
            .env("GOFLAGS", "-mod=readonly -buildvcs=false")
            .env("GOWORK", "off");
        command
    }

    /// The stages that kwok's own release gives to its users: nodes become ready at once, pods run at once.
    fn kwok_stages(&self) -> Result<String> {
        let output = self
            .go(["list", "-m", "-f", "{{.Dir}}", "sigs.k8s.io/kwok"])
            .output()
            .context("cannot start `go`")?;
        let stages = PathBuf::from(String::from_utf8(output.stdout)?.trim()).join("kustomize/stage");
        let mut documents = Vec::new();
        for folder in ["node/fast", "node/heartbeat-with-lease", "pod/fast"] {
            let mut files: Vec<PathBuf> = fs::read_dir(stages.join(folder))
                .with_context(|| format!("kwok's module has no {folder}"))?
                .filter_map(|entry| Some(entry.ok()?.path()))
                .filter(|path| path.extension().is_some_and(|extension| extension == "yaml") && !path.ends_with("kustomization.yaml"))
                .collect();
            files.sort();
            for file in files {
                documents.push(fs::read_to_string(file)?);
            }
        }
        Ok(documents.join("\n---\n"))
    }
}

fn linker_flags() -> String {
    let (version, major, minor) = KUBERNETES;
    let package = "k8s.io/component-base/version";
    format!(
        "-s -w -X {package}.gitVersion={version} -X {package}.gitMajor={major} -X {package}.gitMinor={minor} -X {package}.gitTreeState=clean"
    )
}

fn go_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files: Vec<PathBuf> = fs::read_dir(folder)
        .with_context(|| format!("cannot read {}", folder.display()))?
        .filter_map(|entry| Some(PathBuf::from(entry.ok()?.file_name())))
        .filter(|name| name.extension().is_some_and(|extension| extension == "go") && !name.to_string_lossy().ends_with("_test.go"))
        .collect();
    files.sort();
    Ok(files)
}

/// Whether Go is there to build with.
pub(super) fn has_go() -> bool {
    Command::new("go")
        .arg("version")
        .output()
        .is_ok_and(|output| output.status.success())
}
