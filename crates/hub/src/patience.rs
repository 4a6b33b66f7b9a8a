use std::thread::sleep;
use std::time::Duration;

use crate::http::Failure;
use crate::{HubOptions, Result};

/// The longest that a server's wish to wait is obeyed.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// How often, and after what time, something is tried again.
pub(crate) struct Patience<'a> {
    options: &'a HubOptions,
    /// How often it was in vain.
    pub(crate) tried: u32,
}

impl<'a> Patience<'a> {
    pub(crate) fn new(options: &'a HubOptions) -> Patience<'a> {
        Patience { options, tried: 0 }
    }

    /// Waits, or gives the error back when it has been tried often enough.
    pub(crate) fn wait(&mut self, failure: Failure) -> Result<()> {
        let Some(wish) = failure.again.filter(|_| self.tried < self.options.retries) else {
            return Err(failure.error);
        };
        let own = self.options.retry_wait.saturating_mul(1 << self.tried.min(6));
        sleep(wish.unwrap_or(own).min(LONGEST_WAIT));
        self.tried += 1;
        Ok(())
    }
}

/// Asks until there is an answer, or it has been tried often enough.
pub(crate) fn patiently<T>(options: &HubOptions, mut ask: impl FnMut() -> Result<T, Failure>) -> Result<T> {
    let mut patience = Patience::new(options);
    loop {
        match ask() {
            Ok(answer) => return Ok(answer),
            Err(failure) => patience.wait(failure)?,
        }
    }
}
