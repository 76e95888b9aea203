//! The value of `--cores`: `auto`, `any`, `8-15`, `near:gpu0`, `numa:1`.
//!
//! A list of CPUs means one shard on each of them. `near:` and `numa:` name a part of the machine,
//! which `sys::plan_cores` maps to CPUs at startup. They, and `any`, mean one shard, or N with the
//! suffix `*N`.
//! Parsing does not depend on the machine: it does not check whether a device exists.

use std::fmt;
use std::str::FromStr;

use strsim::levenshtein;

use super::nearest::TYPO_DISTANCE_MAX;
use super::units::{self, CPU_MAX, UnitError, format_cpus};

/// Longest accepted device name in bytes: the kernel's limit for RDMA devices. Network interface
/// names have at most 15 bytes.
const DEVICE_NAME_BYTES_MAX: usize = 64;
/// The valid forms of `--cores`, for error messages.
const FORMS: &str = "auto, any, CPU numbers (1 or 0-3,8; not a count), near:gpu0, near:gpu0-3, \
                     near:eth0, near:mlx5_0, near:0000:3b:00.0 or numa:1; a suffix *N to any, near: \
                     or numa: starts N shards";

/// The CPUs to run shards on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cores {
    /// One shard on the CPUs near the GPUs, pinned to one of them if they are reserved for this
    /// process.
    Auto,
    /// Shards that are not pinned: the scheduler chooses among the CPUs this process may use.
    Any {
        /// Number of shards, from 1 to `CPU_MAX`.
        shards: usize,
    },
    /// One pinned shard on each listed CPU.
    List(Vec<usize>),
    /// Pinned shards on the best CPUs of a part of the machine.
    At {
        /// The part of the machine whose CPUs are used.
        place: Place,
        /// Number of shards, from 1 to `CPU_MAX`.
        shards: usize,
    },
}

/// A part of the machine, named by devices or NUMA nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// The CPUs near these GPUs, numbered from 0 by PCI address, as in `nvidia-smi`.
    Gpus(Vec<usize>),
    /// The CPUs near the device with this PCI address.
    Pci(PciAddress),
    /// The CPUs near this network interface or RDMA device.
    Device(String),
    /// The CPUs of these NUMA nodes.
    Nodes(Vec<usize>),
}

/// A PCI address. Ordered like the device numbering of the kernel and the GPU drivers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PciAddress {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

impl PciAddress {
    /// Parses `0000:3b:00.0`, `3b:00.0` or nvidia-smi's `00000000:3B:00.0`. Returns `None` for any
    /// other text.
    #[must_use]
    pub fn read(text: &str) -> Option<Self> {
        let (front, function) = text.split_once('.')?;
        let (front, device) = front.rsplit_once(':')?;
        let (domain, bus) = front.rsplit_once(':').unwrap_or(("0", front));
        let hex = |digits: &str, len_max: usize| {
            let fits = (1..=len_max).contains(&digits.len());
            let plain = fits && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
            plain.then(|| u32::from_str_radix(digits, 16).ok())?
        };
        let byte = |digits: &str, max: u8| {
            let value = u8::try_from(hex(digits, 2)?).ok()?;
            (value <= max).then_some(value)
        };
        Some(Self {
            domain: hex(domain, 8)?,
            bus: byte(bus, u8::MAX)?,
            device: byte(device, 31)?,
            function: byte(function, 7)?,
        })
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (domain, bus) = (self.domain, self.bus);
        let (device, function) = (self.device, self.function);
        write!(f, "{domain:04x}:{bus:02x}:{device:02x}.{function}")
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gpus(numbers) => write!(f, "near:gpu{}", format_cpus(numbers)),
            Self::Pci(address) => write!(f, "near:{address}"),
            Self::Device(name) => write!(f, "near:{name}"),
            Self::Nodes(numbers) => write!(f, "numa:{}", format_cpus(numbers)),
        }
    }
}

impl fmt::Display for Cores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Any { shards: 1 } => f.write_str("any"),
            Self::Any { shards } => write!(f, "any*{shards}"),
            Self::List(cpus) => f.write_str(&format_cpus(cpus)),
            Self::At { place, shards: 1 } => write!(f, "{place}"),
            Self::At { place, shards } => write!(f, "{place}*{shards}"),
        }
    }
}

/// Reason why a value of `--cores` is not valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CoresError {
    /// The value is neither `auto`, `any` nor a valid CPU list, and does not start with `near:` or
    /// `numa:`.
    Cpus(UnitError),
    /// The value starts with `near:gpu`, but the list of GPU numbers after it is not valid.
    Gpus(UnitError),
    /// The value starts with `numa:`, but the list of node numbers after it is not valid.
    Nodes(UnitError),
    /// The text after `near:` is not a device name or PCI address.
    Device,
    /// The text after `*` is not a number of shards from 1 to `CPU_MAX`.
    Shards,
}

impl CoresError {
    /// Returns the complete error message for `text`, the invalid value of `--cores`, with a
    /// suggestion if a valid value is near enough.
    #[must_use]
    pub fn explain(self, text: &str) -> String {
        let list = |error, what: &str| match error {
            UnitError::Duplicate => format!("names a {what} twice"),
            UnitError::Range => "has a range that ends before it starts".to_owned(),
            UnitError::TooLarge => format!("names a {what} above {}", CPU_MAX - 1),
            UnitError::Empty | UnitError::Number | UnitError::Unit => {
                format!("is not a {what} list")
            }
        };
        let why = match self {
            Self::Cpus(error) => list(error, "CPU"),
            Self::Gpus(error) => list(error, "GPU"),
            Self::Nodes(error) => list(error, "NUMA node"),
            Self::Device => "does not name a device after `near:`".to_owned(),
            Self::Shards => format!("needs a number of shards from 1 to {CPU_MAX} after the `*`"),
        };
        match suggestion(text) {
            Some(suggestion) => {
                format!("`{text}` {why}; did you mean `{suggestion}`? Give {FORMS}")
            }
            None => format!("`{text}` {why}; give {FORMS}"),
        }
    }
}

impl FromStr for Cores {
    type Err = CoresError;

    fn from_str(text: &str) -> Result<Self, CoresError> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        let (place, shards) = match text.rsplit_once('*') {
            Some((place, shards)) => (place, Some(shards)),
            None => (text, None),
        };
        let place = if place == "any" {
            None
        } else if let Some(near) = place.strip_prefix("near:") {
            Some(device(near)?)
        } else if let Some(nodes) = place.strip_prefix("numa:") {
            let nodes = units::cpu_list(nodes).map_err(CoresError::Nodes)?;
            Some(Place::Nodes(nodes))
        } else {
            return units::cpu_list(text)
                .map(Self::List)
                .map_err(CoresError::Cpus);
        };
        let shards = match shards {
            None => 1,
            Some(digits) => match digits.parse() {
                Ok(shards @ 1..=CPU_MAX) => shards,
                _ => return Err(CoresError::Shards),
            },
        };
        Ok(match place {
            None => Self::Any { shards },
            Some(place) => Self::At { place, shards },
        })
    }
}

/// Parses the text after `near:`. A name such as `gpu0` always means a GPU; a network interface
/// with such a name must be given by its PCI address.
fn device(text: &str) -> Result<Place, CoresError> {
    // `nvidia-smi topo -m` writes GPU0.
    if let Some(numbers) = text
        .strip_prefix("gpu")
        .or_else(|| text.strip_prefix("GPU"))
        && !numbers.starts_with(|first: char| !first.is_ascii_digit())
    {
        return units::cpu_list(numbers)
            .map(Place::Gpus)
            .map_err(CoresError::Gpus);
    }
    if let Some(address) = PciAddress::read(text) {
        return Ok(Place::Pci(address));
    }
    let is_name = text.len() <= DEVICE_NAME_BYTES_MAX
        && text.starts_with(|first: char| first.is_ascii_alphabetic())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"._-@".contains(&byte));
    if is_name {
        Ok(Place::Device(text.to_owned()))
    } else {
        Err(CoresError::Device)
    }
}

/// Returns the valid value of `--cores` that is nearest to `text`, or `None` if none is near
/// enough.
fn suggestion(text: &str) -> Option<String> {
    let lower = text.to_ascii_lowercase();
    let (word, rest) = lower.split_once(':').unwrap_or((&lower, ""));
    let mut candidates = vec![
        (0, lower.clone()),
        (levenshtein(word, "auto"), format!("auto{rest}")),
        (levenshtein(word, "near"), format!("near:{rest}")),
        (levenshtein(word, "numa"), format!("numa:{rest}")),
    ];
    if word == "node" {
        candidates.push((0, format!("numa:{rest}")));
    }
    // The prefix `near:` is missing.
    if lower.starts_with("gpu") || PciAddress::read(&lower).is_some() {
        candidates.push((0, format!("near:{lower}")));
    }
    let number = rest.bytes().all(|byte| byte.is_ascii_digit());
    if word == "near" && number {
        candidates.push((0, format!("near:gpu{rest}")));
    }
    for name in ["numa", "node"] {
        if let Some(digits) = lower.strip_prefix(name) {
            candidates.push((0, format!("numa:{digits}")));
        }
    }
    candidates.sort_by_key(|(distance, _)| *distance);
    let close = candidates.into_iter().filter(|(distance, candidate)| {
        *distance <= TYPO_DISTANCE_MAX && candidate != text && candidate.parse::<Cores>().is_ok()
    });
    close.map(|(_, candidate)| candidate).next()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(place: Place, shards: usize) -> Result<Cores, CoresError> {
        Ok(Cores::At { place, shards })
    }

    #[test]
    fn values() {
        let gpus = |numbers: &[usize]| Place::Gpus(numbers.to_vec());
        let nodes = |numbers: &[usize]| Place::Nodes(numbers.to_vec());
        let device = |name: &str| Place::Device(name.to_owned());
        let pci = |domain, bus| {
            let (device, function) = (0, 0);
            Place::Pci(PciAddress {
                domain,
                bus,
                device,
                function,
            })
        };
        for (text, want) in [
            ("auto", Ok(Cores::Auto)),
            ("any", Ok(Cores::Any { shards: 1 })),
            ("any*4", Ok(Cores::Any { shards: 4 })),
            ("any*0", Err(CoresError::Shards)),
            ("any4", Err(CoresError::Cpus(UnitError::Number))),
            ("8-10,1", Ok(Cores::List(vec![8, 9, 10, 1]))),
            ("near:gpu0", at(gpus(&[0]), 1)),
            ("near:GPU0", at(gpus(&[0]), 1)),
            ("near:gpu0-3", at(gpus(&[0, 1, 2, 3]), 1)),
            ("near:gpu0,2", at(gpus(&[0, 2]), 1)),
            ("near:gpu4-7*2", at(gpus(&[4, 5, 6, 7]), 2)),
            ("numa:1", at(nodes(&[1]), 1)),
            ("numa:0-1*8", at(nodes(&[0, 1]), 8)),
            ("near:eth0", at(device("eth0"), 1)),
            ("near:mlx5_0", at(device("mlx5_0"), 1)),
            ("near:enp3s0f0np0.100", at(device("enp3s0f0np0.100"), 1)),
            ("near:gpunet0", at(device("gpunet0"), 1)),
            ("near:0000:3b:00.0", at(pci(0, 0x3b), 1)),
            ("near:3b:00.0*3", at(pci(0, 0x3b), 3)),
            ("near:00000000:3B:00.0", at(pci(0, 0x3b), 1)),
            ("near:10000:e1:00.0", at(pci(0x10000, 0xe1), 1)),
            ("", Err(CoresError::Cpus(UnitError::Empty))),
            ("four", Err(CoresError::Cpus(UnitError::Number))),
            ("8-15*2", Err(CoresError::Cpus(UnitError::Number))),
            ("auto*2", Err(CoresError::Cpus(UnitError::Number))),
            ("near:gpu", Err(CoresError::Gpus(UnitError::Empty))),
            ("near:gpu1-0", Err(CoresError::Gpus(UnitError::Range))),
            ("near:gpu1,1", Err(CoresError::Gpus(UnitError::Duplicate))),
            ("near:gpu1,gpu2", Err(CoresError::Gpus(UnitError::Number))),
            ("numa:", Err(CoresError::Nodes(UnitError::Empty))),
            ("numa:1024", Err(CoresError::Nodes(UnitError::TooLarge))),
            ("near:", Err(CoresError::Device)),
            ("near:1", Err(CoresError::Device)),
            ("near:../../etc", Err(CoresError::Device)),
            ("near:3b:20.0", Err(CoresError::Device)),
            ("near:3b:00.8", Err(CoresError::Device)),
            ("near:000000000:3b:00.0", Err(CoresError::Device)),
            ("near:gpu0*0", Err(CoresError::Shards)),
            ("near:gpu0*", Err(CoresError::Shards)),
            ("near:gpu0*1025", Err(CoresError::Shards)),
            ("near:gpu0*two", Err(CoresError::Shards)),
        ] {
            assert_eq!(text.parse(), want, "{text:?}");
        }
        let long = format!("near:a{}", "b".repeat(64));
        assert_eq!(long.parse::<Cores>(), Err(CoresError::Device));
    }

    #[test]
    fn formatted_values_parse_back() {
        for text in [
            "auto",
            "0-3,8",
            "near:gpu0",
            "near:gpu0-3,6*2",
            "near:eth0",
            "near:0000:3b:00.0",
            "near:10000:e1:1f.7",
            "numa:0-1*4",
        ] {
            assert_eq!(text.parse::<Cores>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn typos_suggest_the_nearest_value() {
        for (text, want) in [
            ("naer:gpu0", Some("near:gpu0")),
            ("nea:gpu0*2", Some("near:gpu0*2")),
            ("near:GPU", None),
            ("Near:eth0", Some("near:eth0")),
            ("near:1", Some("near:gpu1")),
            ("gpu0", Some("near:gpu0")),
            ("gpu0-3", Some("near:gpu0-3")),
            ("3b:00.0", Some("near:3b:00.0")),
            ("nmua:1", Some("numa:1")),
            ("numa1", Some("numa:1")),
            ("node:1", Some("numa:1")),
            ("node1", Some("numa:1")),
            ("atuo", Some("auto")),
            ("AUTO", Some("auto")),
            ("four", None),
            ("0-3,2", None),
            ("near:gpu1-0", None),
            ("", None),
        ] {
            assert!(text.parse::<Cores>().is_err(), "{text}");
            assert_eq!(suggestion(text).as_deref(), want, "{text:?}");
        }
    }
}
