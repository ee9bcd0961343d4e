"""The only place that knows pydicom, highdicom and pynetdicom."""

import logging
import warnings

# pydicom's warnings and decoding errors quote what stands in a data set, and a name must never reach a log
warnings.filterwarnings("ignore", module=r"pydicom\.")
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
