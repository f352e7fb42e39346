//! Programs that rustc has miscompiled: in each, the result of a comparison is used as a value and as a branch.
//!
//! `build/main.rs` and `tests/it/compiler.rs` compile and run this file. It exits with 1 if a result is wrong.

use std::hint::black_box;
use std::process::ExitCode;

/// rust-lang/rust#150904: the comparison's local is assigned again before the branch. Fixed in rustc 1.95.
mod reassigned_local {
    #[inline(never)]
    pub fn check(first: u64, second: u64) -> Result<(), ()> {
        if both_match(first, second) { Ok(()) } else { Err(()) }
    }

    #[inline(always)]
    fn both_match(first: u64, second: u64) -> bool {
        let mut is_match = first == 42;
        is_match &= second == 0;
        is_match
    }
}

/// rust-lang/rust#158206: a comparison is cast to a number and branched on.
mod cast_to_number {
    #[derive(Clone, Copy, PartialEq)]
    pub enum Token {
        Open,
        Word,
        Close,
    }

    pub struct Cursor(pub u32);

    impl Cursor {
        fn peek(&self, tokens: &[Token; 32]) -> Token {
            tokens[(self.0 as usize) % 32]
        }

        #[inline]
        fn consume(&mut self, tokens: &[Token; 32], expected: Token) -> bool {
            let is_expected = self.peek(tokens) == expected;
            self.0 += is_expected as u32;
            is_expected
        }
    }

    #[inline(never)]
    pub fn second_token(tokens: &[Token; 32], mut cursor: Cursor) -> u32 {
        if !cursor.consume(tokens, Token::Open) {
            return 0;
        }
        match cursor.peek(tokens) {
            Token::Open => 1,
            Token::Word => 2,
            Token::Close => 3,
        }
    }
}

/// rust-lang/rust#158206 again, as it was found in this program: a comparison is added to a flag and branched on.
mod added_to_flag {
    pub struct Writer {
        pub blocked_since: Option<u32>,
        pub is_flush_due: bool,
        pub resumed: u32,
    }

    impl Writer {
        #[inline]
        fn unblock(&mut self) -> bool {
            let was_blocked = self.blocked_since.is_some();
            self.is_flush_due |= was_blocked;
            was_blocked
        }

        #[inline(never)]
        pub fn resume(&mut self) {
            if self.unblock() {
                self.resumed += 1;
            }
        }
    }
}

fn main() -> ExitCode {
    use added_to_flag::Writer;
    use cast_to_number::{Cursor, Token, second_token};

    let mut tokens = [Token::Close; 32];
    (tokens[0], tokens[1]) = (Token::Open, Token::Word);
    let mut writer = black_box(Writer { blocked_since: None, is_flush_due: false, resumed: 0 });
    writer.resume();

    let results = [
        ("reassigned_local", reassigned_local::check(black_box(42), black_box(1)).is_err()),
        ("cast_to_number", second_token(black_box(&tokens), Cursor(black_box(0))) == 2),
        ("added_to_flag", !black_box(writer.is_flush_due) && writer.resumed == 0),
    ];
    let mut has_passed = true;
    for (name, is_right) in results {
        println!("{name}: {}", if is_right { "right" } else { "wrong" });
        if !is_right {
            has_passed = false;
        }
    }
    if has_passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
