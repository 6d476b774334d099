"""The clock chip's ten time registers as a function of seconds, and back.

The hard part is that the registers may hold anything: the guest writes them one at a time, in BCD or
binary, in 12 or 24 hours, and may write nonsense. Going back never fails: it carries what is out of range
into the next larger unit, as a calendar would.
"""

from __future__ import annotations

from datetime import date

DAY = 86_400
LAST_DAY = date.max.toordinal()
EPOCH_DAY = date(1970, 1, 1).toordinal()
PM = 1 << 7  # of the hours register, in 12-hour mode

# The registers in the order of all tuples here.
SECONDS, MINUTES, HOURS, WEEKDAY, DAY_OF_MONTH, MONTH, YEAR, CENTURY = range(8)


def encode(value: int, binary: bool) -> int:
    """0..99 as a register."""
    return value if binary else value // 10 << 4 | value % 10


def decode(register: int, binary: bool) -> int:
    """A register as a number: 0..255, or, of BCD digits that are none, up to 165."""
    return register if binary else (register >> 4) * 10 + (register & 15)


def encode_hour(hour: int, binary: bool, hours_24: bool) -> int:
    """0..23 as the hours register."""
    if hours_24:
        return encode(hour, binary)
    return encode(hour % 12 or 12, binary) | PM * (hour >= 12)


def decode_hour(register: int, binary: bool, hours_24: bool) -> int:
    """The hours register as a number, 0..23 if it holds an hour."""
    if hours_24:
        return decode(register, binary)
    return decode(register & ~PM, binary) % 12 + 12 * bool(register & PM)


def registers(seconds: int, weekday_shift: int, binary: bool, hours_24: bool) -> tuple[int, ...]:
    """The eight time registers for `seconds` since 1970; past the year 9999 they start again with the year 1.

    `weekday_shift` is how far the weekday, which the chip counts by itself, is ahead of the calendar's.
    """
    days, rest = divmod(seconds, DAY)
    ordinal = (days + EPOCH_DAY - 1) % LAST_DAY + 1
    today = date.fromordinal(ordinal)
    weekday = (ordinal + weekday_shift) % 7 + 1  # ordinal 7 was a Sunday, which is 1
    plain = (weekday, today.day, today.month, today.year % 100, today.year // 100)
    return (
        encode(rest % 60, binary),
        encode(rest // 60 % 60, binary),
        encode_hour(rest // 3600, binary, hours_24),
        *(encode(value, binary) for value in plain),
    )


def from_registers(held: tuple[int, ...], binary: bool, hours_24: bool) -> tuple[int, int]:
    """Seconds since 1970 and the weekday's shift of eight time registers, whatever they hold."""
    second, minute, _, weekday, day, month, year, century = (decode(value, binary) for value in held)
    hour = decode_hour(held[HOURS], binary, hours_24)
    years, months = divmod((century * 100 + year) * 12 + month - 1, 12)
    ordinal = date((years - 1) % date.max.year + 1, months + 1, 1).toordinal() + day - 1
    seconds = (ordinal - EPOCH_DAY) * DAY + hour * 3600 + minute * 60 + second
    return seconds, (weekday - 1 - (seconds // DAY + EPOCH_DAY)) % 7
