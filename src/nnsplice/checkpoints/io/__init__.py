"""Checkpoints on disk: reading and writing them tensor by tensor.

folder      which tensor is in which file           mapping             a stretch of a file as a tensor
reader      through a mapper, group by group        explain             the same without reading a tensor
writer      from tensors that come one by one       shards              into files of about one size
staging     where the next checkpoint is made       swap                and how it takes the old one's place
"""
