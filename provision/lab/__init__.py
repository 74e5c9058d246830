"""A whole cluster on one machine: golden images as virtual machines, a router and clients in network namespaces.

topology    a cluster file becomes machines, links, and who stands around them
variant     the lab's own copy of the cluster file
router      what the uplink router says
machines    golden images as running machines, for the lab and for the tests of images
space       network namespaces and what connects them
login       ssh to them
state       what runs, for the next command
lab         up, down, and what may happen to a machine or a link
live        what the machines say of themselves
picture     the topology with that, as text and as SVG
"""
