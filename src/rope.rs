//! Rotary positions (RoPE, Su 2021, arXiv 2104.09864).

/// Which elements of a row make a pair that is turned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Pairing {
    /// `i` and `i + width / 2` (Llama, Hugging Face; GPT-NeoX).
    #[default]
    HalfSplit,
    /// `2 i` and `2 i + 1` (GPT-J, the paper).
    Interleaved,
}

/// How rows are turned by their positions: pair `i` of the one at position `p` by an angle that a table
/// gives as `cos, sin` at `[p, i]`.
///
/// The table is the caller's, so that every scaling of positions and frequencies that models use is possible;
/// [`Rope::table`] makes the plain one.
///
/// ```
/// use wgpu_attention::Rope;
/// let rope = Rope { positions: 4096, ..Rope::new(64) };
/// assert_eq!(rope.table(10_000.0).len(), 4096 * 64);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rope {
    /// Which elements make a pair.
    pub pairing: Pairing,
    /// Elements of a row that are turned, from the first on; even. The others stay.
    pub width: usize,
    /// Positions in the table.
    pub positions: usize,
}

impl Rope {
    /// Half-split pairs over `width` elements, and a table for no position yet.
    pub const fn new(width: usize) -> Self {
        Self { pairing: Pairing::HalfSplit, width, positions: 0 }
    }

    /// The table `[positions, width / 2, 2]` of angles `p base^(-2 i / width)`, computed in f64.
    pub fn table(&self, base: f64) -> Vec<f32> {
        let pairs = self.width / 2;
        let frequencies: Vec<f64> =
            (0..pairs).map(|i| base.powf(-2.0 * i as f64 / self.width as f64)).collect();
        let angles = (0..self.positions).flat_map(|p| frequencies.iter().map(move |f| p as f64 * f));
        angles.flat_map(|angle| [angle.cos() as f32, angle.sin() as f32]).collect()
    }

    /// Elements of the table (`usize::MAX` where that overflows).
    pub(crate) fn elements(&self) -> usize {
        self.positions.saturating_mul(self.width)
    }

    /// Why it does not turn rows of `width` elements at positions below `positions`; `None` when it does.
    pub(crate) fn unfit(&self, width: usize, positions: usize) -> Option<String> {
        if self.width == 0 || self.width % 2 == 1 || self.width > width {
            return Some(format!("rope turns {} elements of {width}: an even number up to all", self.width));
        }
        let why = || format!("rope's table has {} positions, the sequence {positions}", self.positions);
        (self.positions < positions).then(why)
    }

    /// The elements of pair `i`.
    pub(crate) fn pair(&self, i: usize) -> [usize; 2] {
        match self.pairing {
            Pairing::HalfSplit => [i, i + self.width / 2],
            Pairing::Interleaved => [2 * i, 2 * i + 1],
        }
    }

    /// Turns a row in place, as the kernels do; `table` is that of all positions.
    ///
    /// # Panics
    /// When the row is shorter than `width`, or the table has no such position.
    pub fn turn(&self, row: &mut [f32], position: usize, table: &[f32]) {
        for i in 0..self.width / 2 {
            let [a, b] = self.pair(i);
            let at = position * self.width + 2 * i;
            let (cos, sin) = (table[at], table[at + 1]);
            (row[a], row[b]) = (row[a] * cos - row[b] * sin, row[b] * cos + row[a] * sin);
        }
    }
}
