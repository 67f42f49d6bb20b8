//! Who owns which page of a paged cache: bookkeeping on the host, for the block tables that kernels read.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::error::{Error, Result};
use crate::problem::MAX_SEQ;

/// Hands out the pages of a cache, which sequences with a common prefix share (PagedAttention, Kwon 2023).
///
/// A page has as many owners as have got it from [`alloc`](Self::alloc) or [`share`](Self::share) and not given
/// it back; it is handed out again when the last one has. No data is here: a page is a number below
/// [`pages`](Self::pages), and where it lies in the cache's buffers is the caller's.
///
/// ```
/// use wgpu_attention::{PageAllocator, Sequence};
/// # fn main() -> wgpu_attention::Result<()> {
/// let mut pages = PageAllocator::new(8);
/// let mut prompt = Sequence::new(16)?;
/// prompt.append(&mut pages, 40)?; // three pages of 16 tokens, the last of them half full
/// assert_eq!(prompt.pages(), [0, 1, 2]);
///
/// // A second answer to the same prompt: full pages are shared, the last one is the caller's to copy.
/// let (mut answer, copy) = prompt.fork(&mut pages)?;
/// let copy = copy.expect("the last page is partly filled");
/// assert_eq!((copy.from, copy.to, copy.tokens), (2, 3, 8));
/// answer.append(&mut pages, 9)?;
/// assert_eq!(answer.pages(), [0, 1, 3, 4]); // a row of the block table, as it is uploaded
///
/// prompt.free(&mut pages)?;
/// answer.free(&mut pages)?;
/// assert_eq!(pages.available(), 8);
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct PageAllocator {
    /// Tells it from others.
    id: usize,
    pages: u32,
    /// Owners of each page that was ever handed out.
    owners: Vec<u64>,
    /// Pages that came back, the last one first.
    free: Vec<u32>,
}

impl PageAllocator {
    /// An allocator of pages `0..pages`, all of them free.
    pub fn new(pages: u32) -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(1);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        Self { id, pages, owners: Vec::new(), free: Vec::new() }
    }

    /// How many pages there are.
    pub const fn pages(&self) -> u32 {
        self.pages
    }

    /// How many pages nobody owns.
    pub fn available(&self) -> u32 {
        self.pages - self.owners.len() as u32 + self.free.len() as u32
    }

    /// How many own a page; 0 where it is free, or there is none of that number.
    pub fn owners(&self, page: u32) -> u64 {
        self.owners.get(page as usize).copied().unwrap_or(0)
    }

    /// A page that nobody owned.
    ///
    /// # Errors
    /// [`Error::OutOfPages`].
    pub fn alloc(&mut self) -> Result<u32> {
        if let Some(page) = self.free.pop() {
            self.owners[page as usize] = 1;
            return Ok(page);
        }
        let page = self.owners.len() as u32;
        if page == self.pages {
            return Err(Error::OutOfPages { need: 1, free: 0 });
        }
        self.owners.push(1);
        Ok(page)
    }

    /// One more owner of a page that somebody owns.
    ///
    /// # Errors
    /// [`Error::PageNotInUse`].
    pub fn share(&mut self, page: u32) -> Result<()> {
        *self.owned(page)? += 1;
        Ok(())
    }

    /// An owner gives its page back. Whether it was the last one.
    ///
    /// # Errors
    /// [`Error::PageNotInUse`].
    pub fn free(&mut self, page: u32) -> Result<bool> {
        let owners = self.owned(page)?;
        *owners -= 1;
        let last = *owners == 0;
        if last {
            self.free.push(page);
        }
        Ok(last)
    }

    fn owned(&mut self, page: u32) -> Result<&mut u64> {
        let pages = self.pages;
        let owners = self.owners.get_mut(page as usize).filter(|owners| **owners > 0);
        owners.ok_or(Error::PageNotInUse { page, pages })
    }
}

/// A page's first `tokens` tokens that the caller has to copy, in every buffer of the cache, before either
/// sequence goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct PageCopy {
    /// The page to read.
    pub from: u32,
    /// The page to write.
    pub to: u32,
    /// Tokens at its beginning that mean anything.
    pub tokens: usize,
}

/// The pages of one sequence and its length: a row of the block table, and an entry of the key lengths.
///
/// Token `i` lies in page `pages()[i / page_size]`, at place `i % page_size`. Only full pages are shared, so
/// that appending never writes to what another sequence reads.
///
/// Pages go back by [`free`](Self::free), not on drop, since the allocator is the caller's. All calls take the
/// allocator that the sequence began with.
#[derive(Debug)]
pub struct Sequence {
    /// The allocator that its pages are of, where it has any.
    allocator: usize,
    page_size: usize,
    len: usize,
    pages: Vec<u32>,
}

impl Sequence {
    /// An empty sequence, over pages of `page_size` tokens.
    ///
    /// # Errors
    /// [`Error::ZeroSize`].
    pub fn new(page_size: usize) -> Result<Self> {
        if page_size == 0 {
            return Err(Error::ZeroSize { what: "page_size" });
        }
        Ok(Self { allocator: 0, page_size, len: 0, pages: Vec::new() })
    }

    /// How many tokens it has.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no token.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Tokens of a page.
    pub fn page_size(&self) -> usize {
        self.page_size
    }

    /// Its pages in the order of their tokens: a row of the block table.
    pub fn pages(&self) -> &[u32] {
        &self.pages
    }

    /// Makes room for `tokens` more tokens, and counts them. Gives the pages that this took: the end of
    /// [`pages`](Self::pages). They come all or none.
    ///
    /// # Errors
    /// [`Error::OutOfPages`], [`Error::TooLarge`] where the sequence would be longer than any problem may be, and
    /// [`Error::PageNotInUse`] with an allocator that is not this sequence's. Then nothing has changed.
    pub fn append(&mut self, allocator: &mut PageAllocator, tokens: usize) -> Result<&[u32]> {
        let len = self.len.saturating_add(tokens);
        if len > MAX_SEQ {
            let what = "the sequence's length".into();
            return Err(Error::TooLarge { what, got: len as u128, max: MAX_SEQ as u64 });
        }
        self.check(allocator, self.pages.len())?;
        self.allocator = allocator.id;
        let before = self.pages.len();
        let (need, free) = ((len.div_ceil(self.page_size) - before) as u64, allocator.available());
        if need > u64::from(free) {
            return Err(Error::OutOfPages { need, free });
        }
        for _ in 0..need {
            self.pages.push(allocator.alloc()?);
        }
        self.len = len;
        Ok(&self.pages[before..])
    }

    /// A second sequence that begins as this one. Full pages are shared; where the last one is only partly
    /// filled, the new sequence gets a page of its own, and the caller has to copy what is in the old one.
    ///
    /// # Errors
    /// [`Error::OutOfPages`], and [`Error::PageNotInUse`] with an allocator that is not this sequence's. Then
    /// nothing has changed.
    pub fn fork(&self, allocator: &mut PageAllocator) -> Result<(Self, Option<PageCopy>)> {
        self.check(allocator, 0)?;
        let tokens = self.len % self.page_size;
        let (full, partly) = self.pages.split_at(self.len / self.page_size);
        let mut pages = full.to_vec();
        let copy = match partly.first() {
            Some(&from) => Some(PageCopy { from, to: allocator.alloc()?, tokens }),
            None => None,
        };
        for &page in full {
            allocator.share(page)?;
        }
        pages.extend(copy.map(|copy| copy.to));
        Ok((Self { pages, ..*self }, copy))
    }

    /// Takes tokens back from its end, such as guesses that were refused: keeps the first `len`, or all where there
    /// are fewer. Pages without tokens go back. Where the last page that stays was full and is shared, this sequence
    /// gets one of its own for it, as by [`fork`](Self::fork), and the caller has to copy what is in the old one.
    ///
    /// # Errors
    /// [`Error::OutOfPages`], and [`Error::PageNotInUse`] with an allocator that is not this sequence's. Then
    /// nothing has changed.
    pub fn truncate(&mut self, allocator: &mut PageAllocator, len: usize) -> Result<Option<PageCopy>> {
        if len >= self.len {
            return Ok(None);
        }
        let (kept, tokens) = (len.div_ceil(self.page_size), len % self.page_size);
        self.check(allocator, kept.saturating_sub(1))?;
        // What is appended must not be written to what another sequence reads.
        let copies = tokens > 0 && allocator.owners(self.pages[kept - 1]) > 1;
        let comes_back = |page: &u32| allocator.owners(*page) == 1;
        if copies && allocator.available() == 0 && !self.pages[kept..].iter().any(comes_back) {
            return Err(Error::OutOfPages { need: 1, free: 0 });
        }
        for page in self.pages.drain(kept..) {
            allocator.free(page)?;
        }
        self.len = len;
        if !copies {
            return Ok(None);
        }
        let (from, to) = (self.pages[kept - 1], allocator.alloc()?);
        self.pages[kept - 1] = to;
        allocator.free(from)?;
        Ok(Some(PageCopy { from, to, tokens }))
    }

    /// Gives all pages back.
    ///
    /// # Errors
    /// [`Error::PageNotInUse`] with an allocator that is not this sequence's; then nothing has changed there.
    pub fn free(self, allocator: &mut PageAllocator) -> Result<()> {
        self.check(allocator, 0)?;
        for page in self.pages {
            allocator.free(page)?;
        }
        Ok(())
    }

    /// Whether that allocator is the one that the pages are of, and these pages from that number on are in use there: so
    /// each can be shared and freed.
    fn check(&self, allocator: &PageAllocator, from: usize) -> Result<()> {
        let other = !self.pages.is_empty() && self.allocator != allocator.id;
        let unknown = |page: &&u32| other || allocator.owners(**page) == 0;
        match self.pages[if other { 0 } else { from }..].iter().find(unknown) {
            Some(&page) => Err(Error::PageNotInUse { page, pages: allocator.pages() }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn pages_are_handed_out_once() {
        let mut pages = PageAllocator::new(3);
        assert_eq!([pages.alloc(), pages.alloc(), pages.alloc()], [Ok(0), Ok(1), Ok(2)]);
        assert_eq!(pages.alloc(), Err(Error::OutOfPages { need: 1, free: 0 }));
        assert_eq!((pages.free(1), pages.available()), (Ok(true), 1));
        assert_eq!((pages.alloc(), pages.available()), (Ok(1), 0));
        assert_eq!(PageAllocator::new(0).alloc(), Err(Error::OutOfPages { need: 1, free: 0 }));
        // As many as there are numbers, without memory for all of them.
        assert_eq!(PageAllocator::new(u32::MAX).available(), u32::MAX);
    }

    #[test]
    fn freeing_twice_and_pages_of_others_are_errors() {
        let mut pages = PageAllocator::new(3);
        let page = pages.alloc().unwrap();
        let not_in_use = |page| Error::PageNotInUse { page, pages: 3 };
        assert_eq!(pages.share(page), Ok(()));
        assert_eq!((pages.owners(page), pages.free(page), pages.free(page)), (2, Ok(false), Ok(true)));
        assert_eq!((pages.free(page), pages.share(page)), (Err(not_in_use(0)), Err(not_in_use(0))));
        // Never handed out, and beyond all of them.
        for foreign in [1, 3, u32::MAX] {
            assert_eq!(
                (pages.free(foreign), pages.share(foreign)),
                (Err(not_in_use(foreign)), Err(not_in_use(foreign)))
            );
        }
        assert_eq!(pages.available(), 3);
        assert_eq!(not_in_use(7).to_string(), "page 7 is not in use; there are 3 pages");
        let out = Error::OutOfPages { need: 4, free: 1 };
        assert_eq!(out.to_string(), "4 pages needed, 1 of the cache's are free");
    }

    #[test]
    fn sequences_grow_by_pages_all_or_none() {
        let mut pages = PageAllocator::new(3);
        assert_eq!(Sequence::new(0).unwrap_err(), Error::ZeroSize { what: "page_size" });
        let mut sequence = Sequence::new(4).unwrap();
        assert_eq!(sequence.append(&mut pages, 0), Ok(&[][..]));
        assert_eq!(sequence.append(&mut pages, 4), Ok(&[0][..]));
        assert_eq!(sequence.append(&mut pages, 1), Ok(&[1][..]));
        assert_eq!(sequence.append(&mut pages, 3), Ok(&[][..]));
        let error = sequence.append(&mut pages, 5).unwrap_err();
        assert_eq!(error, Error::OutOfPages { need: 2, free: 1 });
        assert!(matches!(sequence.append(&mut pages, usize::MAX), Err(Error::TooLarge { .. })));
        assert_eq!((sequence.len(), sequence.pages(), pages.available()), (8, &[0, 1][..], 1));
        assert_eq!(sequence.free(&mut pages), Ok(()));
        assert_eq!(pages.available(), 3);
    }

    #[test]
    fn a_fork_copies_a_page_only_where_it_is_partly_filled() {
        let mut pages = PageAllocator::new(3);
        let mut sequence = Sequence::new(4).unwrap();
        assert_eq!(sequence.fork(&mut pages).unwrap().1, None);
        sequence.append(&mut pages, 4).unwrap();
        let (full, copy) = sequence.fork(&mut pages).unwrap();
        assert_eq!((full.pages(), copy, pages.owners(0)), (&[0][..], None, 2));
        sequence.append(&mut pages, 1).unwrap();
        let (partly, copy) = sequence.fork(&mut pages).unwrap();
        assert_eq!(copy, Some(PageCopy { from: 1, to: 2, tokens: 1 }));
        assert_eq!((partly.pages(), partly.len(), pages.owners(0)), (&[0, 2][..], 5, 3));
        // No page for the copy: no owner more of the others.
        assert_eq!(sequence.fork(&mut pages).unwrap_err(), Error::OutOfPages { need: 1, free: 0 });
        assert_eq!(pages.owners(0), 3);
        // Another allocator's pages.
        let mut other = PageAllocator::new(1);
        other.alloc().unwrap();
        let not_in_use = Error::PageNotInUse { page: 0, pages: 1 };
        assert_eq!(sequence.fork(&mut other).unwrap_err(), not_in_use);
        assert_eq!((sequence.free(&mut other), other.owners(0)), (Err(not_in_use), 1));
    }

    /// A full page that is shared and is to be written to again becomes a copy.
    #[test]
    fn tokens_are_taken_back() {
        let mut pages = PageAllocator::new(4);
        let mut sequence = Sequence::new(4).unwrap();
        sequence.append(&mut pages, 9).unwrap();
        assert_eq!((sequence.truncate(&mut pages, 10), sequence.len()), (Ok(None), 9));
        assert_eq!((sequence.truncate(&mut pages, 8), sequence.pages()), (Ok(None), &[0, 1][..]));
        let (mut other, _) = sequence.fork(&mut pages).unwrap();
        let copy = PageCopy { from: 1, to: 2, tokens: 3 };
        assert_eq!((other.truncate(&mut pages, 7), other.pages()), (Ok(Some(copy)), &[0, 2][..]));
        assert_eq!((pages.owners(0), pages.owners(1), pages.available()), (2, 1, 1));
        // No page for the copy: nothing has changed.
        pages.alloc().unwrap();
        assert_eq!(sequence.truncate(&mut pages, 8), Ok(None));
        assert_eq!(other.truncate(&mut pages, 4), Ok(None));
        pages.alloc().unwrap();
        assert_eq!(other.truncate(&mut pages, 1), Err(Error::OutOfPages { need: 1, free: 0 }));
        assert_eq!((other.len(), other.pages(), pages.owners(0)), (4, &[0][..], 2));
        assert_eq!((other.truncate(&mut pages, 0), pages.owners(0)), (Ok(None), 1));
    }

    #[test]
    fn pages_of_one_allocator_are_not_taken_for_another_s() {
        let [mut a, mut b] = [PageAllocator::new(4), PageAllocator::new(4)];
        let [mut of_a, mut of_b] = [(); 2].map(|()| Sequence::new(1).unwrap());
        of_a.append(&mut a, 1).unwrap();
        of_b.append(&mut b, 1).unwrap();
        assert_eq!((of_a.pages(), of_b.pages()), (&[0][..], &[0][..]));
        let not_in_use = Error::PageNotInUse { page: 0, pages: 4 };
        assert_eq!(of_a.append(&mut b, 1), Err(not_in_use.clone()));
        assert_eq!(of_a.truncate(&mut b, 0), Err(not_in_use.clone()));
        assert_eq!(of_a.fork(&mut b).unwrap_err(), not_in_use);
        assert_eq!((of_a.pages(), of_a.len(), a.available(), b.available()), (&[0][..], 1, 3, 3));
        assert_eq!((of_a.free(&mut b), b.owners(0)), (Err(not_in_use.clone()), 1));
        // One without pages is nobody's.
        of_b.truncate(&mut b, 0).unwrap();
        assert_eq!(of_b.append(&mut a, 1), Ok(&[1][..]));
        // A page that was given back behind its back.
        a.free(1).unwrap();
        assert_eq!(of_b.truncate(&mut a, 0), Err(Error::PageNotInUse { page: 1, pages: 4 }));
    }

    /// Any order of appending, forking, truncating and freeing, against a model that counts owners by looking.
    #[test]
    fn no_page_has_two_owners_that_were_not_forked() {
        for seed in 0..200_u64 {
            let mut state = seed;
            let mut below = |n: usize| {
                // SplitMix64.
                state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
                let mut z = state;
                z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
                ((z ^ (z >> 31)) % n as u64) as usize
            };
            let (total, page_size) = (1 + below(40) as u32, 1 + below(6));
            let mut pages = PageAllocator::new(total);
            // Each sequence with its tokens, which no other has written; and what lies in each page.
            let mut all: Vec<(Sequence, Vec<u32>)> = Vec::new();
            let mut memory: HashMap<(u32, usize), u32> = HashMap::new();
            let mut token = 0;
            for _ in 0..120 {
                let full = |error| assert!(matches!(error, Error::OutOfPages { .. }), "{error}");
                let copied = |memory: &mut HashMap<(u32, usize), u32>, copy: Option<PageCopy>| {
                    for (from, to, at) in copy.iter().flat_map(|c| (0..c.tokens).map(|at| (c.from, c.to, at)))
                    {
                        memory.insert((to, at), memory[&(from, at)]);
                    }
                };
                match (below(10), all.len()) {
                    (0 | 1, _) | (_, 0) => all.push((Sequence::new(page_size).unwrap(), Vec::new())),
                    (2 | 3, n) => {
                        let (sequence, tokens) = &all[below(n)];
                        let tokens = tokens.clone();
                        match sequence.fork(&mut pages) {
                            Ok((sequence, copy)) => {
                                copied(&mut memory, copy);
                                all.push((sequence, tokens));
                            }
                            Err(error) => full(error),
                        }
                    }
                    (4, n) => {
                        let (sequence, _) = all.swap_remove(below(n));
                        sequence.free(&mut pages).unwrap();
                    }
                    (5 | 6, n) => {
                        let (sequence, tokens) = &mut all[below(n)];
                        let len = below(tokens.len() + 2);
                        match sequence.truncate(&mut pages, len) {
                            Ok(copy) => {
                                copied(&mut memory, copy);
                                tokens.truncate(len);
                            }
                            Err(error) => full(error),
                        }
                    }
                    (_, n) => {
                        let (sequence, tokens) = &mut all[below(n)];
                        let more = below(2 * page_size + 1);
                        match sequence.append(&mut pages, more) {
                            Ok(_) => {
                                for i in sequence.len() - more..sequence.len() {
                                    token += 1;
                                    tokens.push(token);
                                    memory.insert((sequence.pages()[i / page_size], i % page_size), token);
                                }
                            }
                            Err(error) => full(error),
                        }
                    }
                }
                // Each sequence still finds its own tokens: nobody has written over them.
                let mut owners: HashMap<u32, u64> = HashMap::new();
                for (sequence, tokens) in &all {
                    assert_eq!(sequence.len(), tokens.len());
                    assert_eq!(sequence.pages().len(), tokens.len().div_ceil(page_size));
                    for (i, token) in tokens.iter().enumerate() {
                        assert_eq!(
                            memory[&(sequence.pages()[i / page_size], i % page_size)],
                            *token,
                            "{seed}"
                        );
                    }
                    sequence.pages().iter().for_each(|&page| *owners.entry(page).or_default() += 1);
                }
                for page in 0..total {
                    assert_eq!(pages.owners(page), owners.get(&page).copied().unwrap_or(0), "{seed}");
                }
                assert_eq!(pages.available(), total - owners.len() as u32, "{seed}");
            }
            all.into_iter().for_each(|(sequence, _)| sequence.free(&mut pages).unwrap());
            assert_eq!(pages.available(), total);
        }
    }
}
