//! The container images, built without Docker as reproducible OCI archives.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use sha2::{Digest as _, Sha256};

use crate::onnxruntime::{self, Library};
use crate::{cluster, progress, workspace};
use archive::{Image, Process};
use layer::{Layer, USER_ID};
pub(crate) use program::Profile;

mod archive;
mod filesystem;
mod layer;
pub(crate) mod program;
mod revision;

/// Where the images are published.
const REPOSITORY: &str = "ghcr.io/plimsoll-dev";

/// What the registry's image does by default is what the chart has it do.
const REGISTRY_CONFIGURATION: &str = include_str!("../../charts/plimsoll/files/registry.yml");

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Folder for the archives. Default: `images` in the target folder.
    #[arg(long)]
    output: Option<PathBuf>,
    /// How the programs are compiled.
    #[arg(long, value_enum, default_value_t = Profile::Release)]
    profile: Profile,
    /// Also builds the image that only the end-to-end tests use.
    #[arg(long)]
    tests: bool,
    /// The images to build. Default: operator, optimizer, runtime and registry. runtime-cuda, of 1.4 GB, is the runtime for models on
    /// NVIDIA's GPUs.
    #[arg(value_parser = clap::builder::PossibleValuesParser::new(SPECIFICATIONS.iter().map(|specification| specification.name)))]
    names: Vec<String>,
}

enum Program {
    /// A package of the workspace, and the library of ONNX Runtime that it loads.
    Package { name: &'static str, onnxruntime: Option<Library> },
    /// A static program that the embedded cluster's tools bring.
    Tool { name: &'static str },
}

struct Specification {
    name: &'static str,
    title: &'static str,
    program: Program,
    /// Most that the image may hold when unpacked, in bytes.
    limit_bytes: Option<u64>,
    purpose: Purpose,
}

/// What an image is for, which decides when it is built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    /// An installation's.
    Installation,
    /// Of an installation with GPUs: built where it is named.
    Gpu,
    /// Of tests alone: tagged `test`, and built on demand.
    Test,
}

const SPECIFICATIONS: [Specification; 6] = [
    Specification {
        name: "operator",
        title: "Plimsoll's control plane",
        program: Program::Package {
            name: "plimsoll-operator",
            onnxruntime: None,
        },
        limit_bytes: Some(40_000_000),
        purpose: Purpose::Installation,
    },
    Specification {
        name: "optimizer",
        title: "Plimsoll's optimiser of models",
        program: Program::Package {
            name: "plimsoll-optimizer",
            onnxruntime: Some(Library::Cpu),
        },
        limit_bytes: None,
        purpose: Purpose::Installation,
    },
    Specification {
        name: "runtime",
        title: "Plimsoll's inference server",
        program: Program::Package {
            name: "plimsoll-runtime",
            onnxruntime: Some(Library::Cpu),
        },
        limit_bytes: Some(80_000_000),
        purpose: Purpose::Installation,
    },
    Specification {
        name: "runtime-cuda",
        title: "Plimsoll's inference server on NVIDIA's GPUs",
        program: Program::Package {
            name: "plimsoll-runtime",
            onnxruntime: Some(Library::Gpu),
        },
        limit_bytes: None,
        purpose: Purpose::Gpu,
    },
    Specification {
        name: "registry",
        title: "CNCF Distribution, as Plimsoll's chart runs it",
        program: Program::Tool { name: "registry" },
        limit_bytes: None,
        purpose: Purpose::Installation,
    },
    Specification {
        name: "fixture-server",
        title: "A server of files and faults for Plimsoll's tests",
        program: Program::Tool { name: "fixture-server" },
        limit_bytes: None,
        purpose: Purpose::Test,
    },
];

/// The task `cargo xtask images`.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let chosen = |specification: &&Specification| match &arguments.names[..] {
        [] if specification.purpose == Purpose::Installation => true,
        names => names.iter().any(|name| name == specification.name) || (specification.purpose == Purpose::Test && arguments.tests),
    };
    let chosen: Vec<&Specification> = SPECIFICATIONS.iter().filter(chosen).collect();
    let output = arguments.output.clone().unwrap_or_else(|| folder(arguments.profile));
    let built = build_all(&chosen, &output, arguments.profile)?;
    println!("{}", table(&built));
    println!("archives in {}", output.display());
    within_limits(&built, arguments.profile)
}

/// Builds the images of these names, with release programs, and returns their archives in the same order. What is fresh is left alone.
///
/// # Errors
/// Where a name is unknown, a program does not compile, or an image grew over its limit.
pub(crate) fn build(names: &[&str]) -> Result<Vec<PathBuf>> {
    let chosen: Vec<&Specification> = names.iter().map(|name| specification(name)).collect::<Result<_>>()?;
    let built = build_all(&chosen, &folder(Profile::Release), Profile::Release)?;
    within_limits(&built, Profile::Release)?;
    Ok(built.into_iter().map(|built| built.path).collect())
}

/// Every image's name and full reference, those for tests included.
pub(crate) fn references() -> Vec<(&'static str, String)> {
    SPECIFICATIONS
        .iter()
        .map(|specification| (specification.name, reference(specification)))
        .collect()
}

/// The chart's value that makes the pods under `key` anew where `image` was built anew, whose tag is the same for every build of a version.
///
/// # Errors
/// Where `archives` lack the image.
pub(crate) fn pod_annotation(archives: &[PathBuf], image: &str, key: &str) -> Result<String> {
    let archive = archives.iter().find(|path| path.file_stem().is_some_and(|stem| stem == image));
    let digest = archive::digest_of(archive.with_context(|| format!("the image {image} has no archive"))?)?;
    let digest = digest.rsplit(':').next().unwrap_or_default();
    Ok(format!("{key}.podAnnotations.plimsoll\\.dev/image={}", &digest[..16]))
}

/// Builds programs of the workspace as the images hold them, for use outside of them.
///
/// # Errors
/// Where one does not compile.
pub(crate) fn programs(packages: &[&str]) -> Result<Vec<PathBuf>> {
    program::build(packages, Profile::Release)
}

struct Built {
    reference: String,
    path: PathBuf,
    digest: String,
    record: Record,
    limit_bytes: Option<u64>,
}

/// Stands beside an archive and says what it was made of.
#[derive(PartialEq, serde::Serialize, serde::Deserialize)]
struct Record {
    inputs: String,
    unpacked_bytes: u64,
    packed_bytes: u64,
}

fn folder(profile: Profile) -> PathBuf {
    workspace::target().join("images").join(match profile {
        Profile::Release => "archives",
        Profile::Dev => "archives-dev",
    })
}

fn specification(name: &str) -> Result<&'static Specification> {
    let found = SPECIFICATIONS.iter().find(|specification| specification.name == name);
    found.with_context(|| {
        format!(
            "no image `{name}`; there are {}",
            SPECIFICATIONS.map(|specification| specification.name).join(", ")
        )
    })
}

fn reference(specification: &Specification) -> String {
    let tag = if specification.purpose == Purpose::Test {
        "test"
    } else {
        env!("CARGO_PKG_VERSION")
    };
    format!("{REPOSITORY}/{}:{tag}", specification.name)
}

fn build_all(chosen: &[&'static Specification], output: &Path, profile: Profile) -> Result<Vec<Built>> {
    ensure!(
        cfg!(target_os = "linux"),
        "images are built from Linux programs: use the Dockerfiles in images/ on this system"
    );
    fs::create_dir_all(output).with_context(|| format!("cannot make {}", output.display()))?;
    let packages: Vec<&str> = chosen
        .iter()
        .filter_map(|specification| match specification.program {
            Program::Package { name, .. } => Some(name),
            Program::Tool { .. } => None,
        })
        .collect();
    let mut programs = program::build(&packages, profile)?.into_iter();
    let revision = revision::Revision::current();
    let mut built = Vec::new();
    for specification in chosen {
        let program = match specification.program {
            Program::Package { .. } => programs.next().context("every package gave a program")?,
            Program::Tool { name } => cluster::tool(name)?,
        };
        let image = assemble(specification, &program, &revision, output)?;
        built.push(image);
    }
    Ok(built)
}

/// Debug information makes every program large: only release images have limits.
fn within_limits(built: &[Built], profile: Profile) -> Result<()> {
    let size = |image: &Built| image.record.unpacked_bytes;
    let over = |image: &&Built| profile == Profile::Release && image.limit_bytes.is_some_and(|limit| size(image) > limit);
    let over: Vec<String> = built
        .iter()
        .filter(over)
        .map(|image| {
            format!(
                "{} is {} MB of at most {}",
                image.reference,
                megabytes(size(image)),
                megabytes(image.limit_bytes.unwrap_or_default())
            )
        })
        .collect();
    ensure!(over.is_empty(), "too large: {}", over.join(", "));
    Ok(())
}

fn assemble(specification: &Specification, program: &Path, revision: &revision::Revision, output: &Path) -> Result<Built> {
    let reference = reference(specification);
    let (layers, process) = contents(specification, program, revision)?;
    let mut inputs = Sha256::new();
    inputs.update(format!("{reference}\n{}\n{}\n", revision.created, serde_json::to_string(&process)?));
    for layer in &layers {
        inputs.update(layer.fingerprint());
    }
    let inputs = hex::encode(inputs.finalize());

    let path = output.join(format!("{}.tar", specification.name));
    let record_path = output.join(format!("{}.json", specification.name));
    let earlier: Option<Record> = fs::read(&record_path).ok().and_then(|text| serde_json::from_slice(&text).ok());
    if let (Some(record), Ok(digest)) = (earlier, archive::digest_of(&path))
        && record.inputs == inputs
    {
        return Ok(Built {
            reference,
            path,
            digest,
            record,
            limit_bytes: specification.limit_bytes,
        });
    }
    progress::phase(&format!("packing the image {reference}"), |_| {
        let layers = layers.iter().map(Layer::pack).collect::<Result<Vec<_>>>()?;
        let record = Record {
            inputs,
            unpacked_bytes: layers.iter().map(|layer| layer.unpacked_bytes).sum(),
            packed_bytes: layers.iter().map(|layer| layer.bytes.len() as u64).sum(),
        };
        let digest = archive::write(
            &Image {
                reference: &reference,
                created: &revision.created,
                process,
                layers,
            },
            &path,
        )?;
        fs::write(&record_path, serde_json::to_vec(&record)?)?;
        Ok(Built {
            reference,
            path,
            digest,
            record,
            limit_bytes: specification.limit_bytes,
        })
    })
}

/// What an image holds and runs: the base first, which changes least, the program last.
fn contents(specification: &Specification, program: &Path, revision: &revision::Revision) -> Result<(Vec<Layer>, Process)> {
    let name = program.file_name().and_then(|name| name.to_str()).context("a program has a name")?;
    let libraries = filesystem::libraries(program)?;
    let mut layers = vec![filesystem::base(&libraries)?];
    let mut process = Process {
        user: format!("{USER_ID}:{USER_ID}"),
        env: vec!["PATH=/usr/bin".to_owned(), format!("SSL_CERT_FILE={}", filesystem::CERTIFICATES)],
        entrypoint: vec![format!("/usr/bin/{name}")],
        working_dir: "/".to_owned(),
        labels: labels(specification, revision),
        ..Process::default()
    };
    let mut last = Layer::default();
    last.copy(program, &format!("usr/bin/{name}"), 0o755)?;
    match specification.program {
        Program::Package {
            onnxruntime: Some(library),
            ..
        } => {
            if library == Library::Gpu {
                layers.push(filesystem::cuda(&onnxruntime::cuda()?)?);
                process.env.push(format!("LD_LIBRARY_PATH={}", filesystem::CUDA));
                process.env.push("PLIMSOLL_DEVICE=cuda:0".to_owned());
                // What NVIDIA's container toolkit mounts into the container: the driver, and its management library for metrics.
                process.env.push("NVIDIA_DRIVER_CAPABILITIES=compute,utility".to_owned());
            }
            layers.push(filesystem::onnxruntime(&library.path()?, &libraries)?);
            process.env.push(format!("ORT_DYLIB_PATH={}", filesystem::ONNXRUNTIME));
        }
        Program::Package { onnxruntime: None, .. } => {}
        Program::Tool { name } => {
            if !libraries.is_empty() {
                bail!("the program {name} must be static, and links {libraries:?}");
            }
            if name == "registry" {
                last.file("etc/distribution/config.yml", 0o644, REGISTRY_CONFIGURATION);
                last.folder("var/lib/registry", 0o750, true);
                process.cmd = vec!["serve".to_owned(), "/etc/distribution/config.yml".to_owned()];
                process.exposed_ports = BTreeMap::from([("5000/tcp".to_owned(), BTreeMap::new())]);
                process.env.push("OTEL_TRACES_EXPORTER=none".to_owned());
            }
        }
    }
    layers.push(last);
    Ok((layers, process))
}

fn labels(specification: &Specification, revision: &revision::Revision) -> BTreeMap<String, String> {
    let label = |name: &str, value: &str| (format!("org.opencontainers.image.{name}"), value.to_owned());
    BTreeMap::from([
        label("title", specification.name),
        label("description", specification.title),
        label("version", env!("CARGO_PKG_VERSION")),
        label("revision", &revision.commit),
        label("created", &revision.created),
        label("source", env!("CARGO_PKG_REPOSITORY")),
        label("licenses", "Apache-2.0"),
    ])
}

fn table(built: &[Built]) -> comfy_table::Table {
    let mut table = comfy_table::Table::new();
    table
        .load_style(comfy_table::presets::UTF8_FULL_CONDENSED)
        .set_header(["image", "unpacked MB", "limit MB", "archive MB", "digest"]);
    for image in built {
        table.add_row([
            image.reference.clone(),
            megabytes(image.record.unpacked_bytes),
            image.limit_bytes.map(megabytes).unwrap_or_default(),
            megabytes(image.record.packed_bytes),
            image.digest.chars().take("sha256:".len() + 12).collect(),
        ]);
    }
    table
}

fn megabytes(bytes: u64) -> String {
    format!("{}.{}", bytes / 1_000_000, bytes % 1_000_000 / 100_000)
}

#[cfg(test)]
mod tests;
