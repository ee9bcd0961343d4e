"""BUSGen-CDS: clinical decision support for breast ultrasound. Research software, not a medical device."""

__version__ = "0.1.0"
