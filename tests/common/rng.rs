//! A small seeded generator, so that a failure can print one number that repeats it.

/// SplitMix64 (Steele, Lea, Flood 2014).
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `0..n`; `n` is at least 1.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// Uniform in `[0, 1)`.
    pub fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub fn chance(&mut self, probability: f64) -> bool {
        self.uniform() < probability
    }

    /// Standard normal (Box and Muller).
    pub fn normal(&mut self) -> f32 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        (radius * (std::f64::consts::TAU * self.uniform()).cos()) as f32
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

/// A number out of an environment variable.
///
/// # Panics
/// When it is set to something else: a typo must not pass as the default.
pub fn env_number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let number = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    Some(number.unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

/// `WGPU_ATTENTION_TABLE=N`: one row of N is tried, for slow adapters and for hunting planted bugs.
pub fn every() -> usize {
    env_number("WGPU_ATTENTION_TABLE").unwrap_or(1).max(1) as usize
}

/// Whether the row `at` of a table has its turn where each row costs an adapter several kernels: on the slowest
/// one of two has.
pub fn has_turn(at: usize) -> bool {
    at.is_multiple_of(every().div_ceil(10))
}

/// Every Nth row of a table from row `WGPU_ATTENTION_FIRST` on: adapters that cannot try all of them in time
/// try different ones.
pub fn slice<T>(table: impl IntoIterator<Item = T>) -> impl Iterator<Item = T> {
    let first = env_number("WGPU_ATTENTION_FIRST").unwrap_or(0) as usize;
    let table: Vec<T> = table.into_iter().collect();
    let turns = every().min(table.len()).max(1);
    table.into_iter().skip(first % turns).step_by(every())
}

/// A seed that no run has seen before, or the one in `WGPU_ATTENTION_SEED`.
pub fn fresh_seed() -> u64 {
    env_number("WGPU_ATTENTION_SEED").unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Rng::new(now.map_or(0, |now| now.as_nanos() as u64)).next()
    })
}
