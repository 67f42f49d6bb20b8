//! [`Family`]: which kernels compute attention.

use std::fmt;
use std::str::FromStr;

use crate::caps::Caps;
use crate::error::{Error, Result, named};
use crate::plan::Path;
use crate::{fused, fused_matrix};

/// A family of kernels: one way to compute attention. Each belongs to a [`Path`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Family {
    /// Staged products, tiles of both operands in workgroup memory: for GPUs.
    StagedTile,
    /// Staged products from registers fed straight from storage, one operand at workgroup-uniform
    /// addresses and no barrier: for adapters that run on a CPU.
    StagedDirect,
    /// One kernel, a workgroup for a tile of query rows, keys and values in workgroup memory: for
    /// GPUs, at any limits.
    FusedTile,
    /// The same with subgroup operations in the place of most of the workgroup memory: for GPUs that
    /// offer them, with subgroups of any size from 4 to 128.
    FusedSubgroup,
    /// One kernel whose products run on cooperative matrices, f16 tensors alone: for GPUs with matrix
    /// units. Keys by codes ([`Dtype::Int8`](crate::Dtype::Int8)) become f16 in it, those beyond ±65504 the nearest
    /// one. See [`Attention::self_test`](crate::Attention::self_test).
    FusedMatrix,
    /// One kernel, a thread for a few query rows, no workgroup memory: for adapters that run on a CPU.
    FusedRow,
}

impl Family {
    /// Every family.
    pub const ALL: &'static [Self] = &[
        Self::StagedTile,
        Self::StagedDirect,
        Self::FusedTile,
        Self::FusedSubgroup,
        Self::FusedMatrix,
        Self::FusedRow,
    ];

    /// The path that these kernels make up.
    pub fn path(self) -> Path {
        match self {
            Self::StagedTile | Self::StagedDirect => Path::Staged,
            Self::FusedTile | Self::FusedSubgroup | Self::FusedMatrix | Self::FusedRow => Path::Fused,
        }
    }

    /// Its name among the families of its path.
    pub fn name(self) -> &'static str {
        match self {
            Self::StagedTile | Self::FusedTile => "tile",
            Self::StagedDirect => "direct",
            Self::FusedSubgroup => "tile_subgroup",
            Self::FusedMatrix => "tile_matrix",
            Self::FusedRow => "row",
        }
    }

    /// What a device lacks for these kernels whatever the problem; `None` where it lacks nothing.
    ///
    /// ```
    /// use wgpu_attention::{Caps, Family};
    /// let least = Caps::minimal();
    /// assert!(Family::FusedTile.lacks(&least).is_none() && Family::FusedSubgroup.lacks(&least).is_some());
    /// ```
    pub fn lacks(self, caps: &Caps) -> Option<String> {
        let tile = |subgroup| fused::tile(1, 64, 64, subgroup, caps);
        match self {
            Self::FusedSubgroup => tile(true).subgroup_unfit(caps),
            Self::FusedMatrix => fused_matrix::lacks(caps),
            Self::StagedTile | Self::StagedDirect | Self::FusedTile | Self::FusedRow => None,
        }
    }

    /// The families of a path.
    pub fn of(path: Path) -> impl Iterator<Item = Self> {
        Self::ALL.iter().copied().filter(move |family| family.path() == path)
    }
}

/// `staged:tile`, `fused:tile`, ...
impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.path(), self.name())
    }
}

impl FromStr for Family {
    type Err = Error;

    /// Reads what `Display` writes.
    ///
    /// # Errors
    /// [`Error::Name`].
    fn from_str(s: &str) -> Result<Self> {
        named(Self::ALL, s, "kernel family")
    }
}
