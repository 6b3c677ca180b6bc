"""extract-kernel.py VMLINUZ OUT: unpacks the kernel inside a compressed image, so that the guest need not do it."""

import lzma
import sys

with open(sys.argv[1], "rb") as image:
    data = image.read()
start = data.find(b"\xfd7zXZ\x00")
if start < 0:
    sys.exit("the image is not packed with xz; use another kernel package")
kernel = lzma.LZMADecompressor().decompress(data[start:])
with open(sys.argv[2], "wb") as out:
    out.write(kernel)
