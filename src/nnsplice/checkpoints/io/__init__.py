"""Checkpoints on disk: reading and writing them tensor by tensor.

folder          the tensors of a checkpoint folder, with their files
mapping         a byte range of a file as a tensor, memory-mapped if it is large
reader          read or load through a mapper, group by group
explain         a dry run of a mapper, as a table
writer          write from an iterable of tensors
shards          files of about one size, written as tensors come
staging         the folder in which a checkpoint is written before it replaces the old one
swap            two folders exchanged in one step
workers         read and write with several processes of one machine
team, distributed   write with the processes of torch.distributed
"""
