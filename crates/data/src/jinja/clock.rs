//! What `strftime_now` answers.

/// The date and time that `strftime_now` answers with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// Year of the common era.
    pub year: i64,
    /// Month, 1 to 12.
    pub month: u32,
    /// Day of the month, 1 to 31.
    pub day: u32,
    /// Hour, 0 to 23.
    pub hour: u32,
    /// Minute, 0 to 59.
    pub minute: u32,
    /// Second, 0 to 59.
    pub second: u32,
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];

impl Now {
    /// The clock of this machine, in UTC.
    pub fn system() -> Now {
        let seconds = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |since| since.as_secs() as i64);
        Now::from_unix(seconds)
    }

    /// The moment `seconds` after 1970-01-01 00:00 UTC.
    pub fn from_unix(seconds: i64) -> Now {
        // Days to a civil date: Howard Hinnant's algorithm, eras of 400 years that start in March.
        let days = seconds.div_euclid(86_400);
        let rest = seconds.rem_euclid(86_400) as u32;
        let shifted = days + 719_468;
        let era = shifted.div_euclid(146_097);
        let day_of_era = shifted.rem_euclid(146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * day_of_year + 2) / 153;
        let day = (day_of_year - (153 * month_from_march + 2) / 5 + 1) as u32;
        let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 } as u32;
        let year = year_of_era + era * 400 + i64::from(month <= 2);
        Now { year, month, day, hour: rest / 3600, minute: rest / 60 % 60, second: rest % 60 }
    }

    /// Reads `2026-01-31` or `2026-01-31T12:30:00` (a space instead of the `T`, and missing seconds, are fine).
    pub fn parse(text: &str) -> Option<Now> {
        let (date, time) = text.split_once(['T', ' ']).unwrap_or((text, "0:0:0"));
        let mut date = date.splitn(3, '-').map(|part| part.parse::<i64>().ok());
        let (year, month, day) = (date.next()??, date.next()??, date.next()??);
        let mut time = time.trim_end_matches('Z').splitn(3, ':').map(|part| part.parse::<u32>().ok());
        let (hour, minute) = (time.next()??, time.next()??);
        let second = time.next().unwrap_or(Some(0))?;
        let valid = (1..=9999).contains(&year)
            && (1..=12).contains(&month)
            && (1..=31).contains(&day)
            && hour < 24
            && minute < 60
            && second < 60;
        valid.then_some(Now { year, month: month as u32, day: day as u32, hour, minute, second })
    }

    fn days_from_epoch(self) -> i64 {
        let year = self.year - i64::from(self.month <= 2);
        let era = year.div_euclid(400);
        let year_of_era = year.rem_euclid(400);
        let month_from_march = (i64::from(self.month) + 9) % 12;
        let day_of_year = (153 * month_from_march + 2) / 5 + i64::from(self.day) - 1;
        era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
    }

    /// As C's `strftime` in the C locale; an unknown directive stays as it is.
    pub(super) fn format(self, format: &str) -> String {
        let weekday = WEEKDAYS[(self.days_from_epoch() + 3).rem_euclid(7) as usize];
        let month = MONTHS[(self.month as usize).saturating_sub(1).min(11)];
        let hour_of_12 = (self.hour + 11) % 12 + 1;
        let half = if self.hour < 12 { "AM" } else { "PM" };
        let day_of_year = self.days_from_epoch() - Now { month: 1, day: 1, ..self }.days_from_epoch() + 1;
        let mut out = String::new();
        let mut chars = format.chars();
        while let Some(c) = chars.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            let (unpadded, directive) = match chars.next() {
                Some('-') => (true, chars.next()),
                other => (false, other),
            };
            let two = |n: u32| if unpadded { n.to_string() } else { format!("{n:02}") };
            match directive {
                Some('Y') => out.push_str(&self.year.to_string()),
                Some('y') => out.push_str(&two(self.year.rem_euclid(100) as u32)),
                Some('m') => out.push_str(&two(self.month)),
                Some('d') => out.push_str(&two(self.day)),
                Some('e') => out.push_str(&format!("{:2}", self.day)),
                Some('j') => out.push_str(&format!("{day_of_year:03}")),
                Some('B') => out.push_str(month),
                Some('b' | 'h') => out.push_str(&month[..3]),
                Some('A') => out.push_str(weekday),
                Some('a') => out.push_str(&weekday[..3]),
                Some('H') => out.push_str(&two(self.hour)),
                Some('I') => out.push_str(&two(hour_of_12)),
                Some('M') => out.push_str(&two(self.minute)),
                Some('S') => out.push_str(&two(self.second)),
                Some('p') => out.push_str(half),
                Some('F') => out.push_str(&self.format("%Y-%m-%d")),
                Some('T') => out.push_str(&self.format("%H:%M:%S")),
                Some('Z') => out.push_str("UTC"),
                Some('%') => out.push('%'),
                Some(other) => out.extend(['%', other]),
                None => out.push('%'),
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_right() {
        let check = |seconds: i64, expected: &str| {
            assert_eq!(Now::from_unix(seconds).format("%Y-%m-%d %H:%M:%S %a"), expected);
        };
        check(0, "1970-01-01 00:00:00 Thu");
        check(951_782_400, "2000-02-29 00:00:00 Tue");
        check(1_767_225_599, "2025-12-31 23:59:59 Wed");
        assert_eq!(Now::parse("2026-13-01"), None);
    }
}
