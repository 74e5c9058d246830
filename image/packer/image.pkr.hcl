# Boots the disk once, lets it finish what only a running system can, seals it and powers it off.
#
# Written in what Packer 1.6.6 (Debian's) and current releases both accept. No plugin block stands here, since 1.6.6 refuses
# it; a current Packer finds an installed qemu plugin without (see plugins/).

packer {
  required_version = ">= 1.6.6"
}

variable "name" {
  type        = string
  description = "What the machine and its disk are called."
}

variable "disk" {
  type        = string
  description = "The raw disk to start from; it is only read."
}

variable "disk_mib" {
  type        = number
  description = "Its size. Without it Packer would make a disk of 40 GB over the backing file."
}

variable "work" {
  type        = string
  description = "A directory that takes the console, the QEMU process id and the result."
}

variable "accelerator" {
  type        = string
  description = "What the probe has proven to work. Never left to Packer, which looks for /dev/kvm and believes it."

  validation {
    condition     = contains(["kvm", "tcg"], var.accelerator)
    error_message = "The accelerator must be kvm or tcg."
  }
}

variable "cpu" {
  type        = string
  description = "The model for QEMU's -cpu."
}

variable "cpus" {
  type    = number
  default = 2
}

variable "memory" {
  type        = number
  default     = 1024
  description = "MiB."
}

variable "ssh_key" {
  type        = string
  description = "The private key for root; its public half comes in through credentials."
}

variable "ssh_port" {
  type        = number
  description = "A free port of 127.0.0.1."
}

variable "credentials" {
  type        = string
  description = "The value of QEMU's -smbios: systemd credentials for this boot only, so that nothing has to be baked in."
}

variable "ssh_timeout" {
  type        = string
  description = "How long the machine may take until it can be logged in to."
}

variable "shutdown_timeout" {
  type        = string
  description = "How long it may take to power off."
}

variable "kernel_args" {
  type        = string
  description = "What must stand on the kernel's command line, separated by blanks."
}

variable "modules" {
  type        = string
  description = "Kernel modules that must load, separated by blanks."
}

variable "finish" {
  type        = string
  description = "The script that checks and finishes the running system."
}

variable "seal" {
  type        = string
  description = "The script that removes what is this machine's own, made from hygiene.yaml."
}

variable "version" {
  type        = string
  description = "The image's version, for /etc/lvsforge-release."
}

source "qemu" "image" {
  vm_name          = var.name
  output_directory = "${var.work}/machine"

  disk_image = true
  iso_url    = var.disk
  # The store has its hash, taken when it was written; reading 2 GiB again would cost more than the boot of some machines.
  iso_checksum     = "none"
  format           = "qcow2"
  use_backing_file = true
  disk_size        = "${var.disk_mib}M"
  # QEMU 6.1 and later want to be told what the backing file is.
  qemu_img_args {
    create = ["-F", "raw"]
  }

  # The result is converted once, by us; whatever the guest trims must reach the overlay.
  skip_compaction    = true
  disk_compression   = false
  disk_interface     = "virtio"
  disk_cache         = "unsafe"
  disk_discard       = "unmap"
  disk_detect_zeroes = "unmap"

  accelerator  = var.accelerator
  machine_type = "q35"
  cpus         = var.cpus
  memory       = var.memory
  net_device   = "virtio-net-pci"
  headless     = true
  disable_vnc  = true

  # A switch given here replaces all of Packer's own for that switch: the network card is repeated, on 127.0.0.1 only, where
  # Packer forwards the ssh port on every address of the builder.
  qemuargs = [
    ["-cpu", var.cpu],
    ["-display", "none"],
    ["-serial", "file:${var.work}/console.log"],
    ["-pidfile", "${var.work}/qemu.pid"],
    ["-smbios", var.credentials],
    ["-netdev", "user,id=user.0,hostfwd=tcp:127.0.0.1:{{ .SSHHostPort }}-:22"],
    ["-device", "virtio-net-pci,netdev=user.0,romfile="],
    ["-device", "virtio-rng-pci"],
  ]

  boot_wait            = "-1s"
  communicator         = "ssh"
  ssh_username         = "root"
  ssh_private_key_file = var.ssh_key
  host_port_min        = var.ssh_port
  host_port_max        = var.ssh_port
  ssh_timeout          = var.ssh_timeout
  # A login while the machine is still busy under emulation may be cut off; one that is refused is refused for good.
  ssh_handshake_attempts = 30

  shutdown_command = "systemctl poweroff"
  shutdown_timeout = var.shutdown_timeout
}

build {
  sources = ["source.qemu.image"]

  provisioner "shell" {
    script           = var.finish
    environment_vars = ["KERNEL_ARGS=${var.kernel_args}", "MODULES=${var.modules}"]
  }

  provisioner "shell" {
    script           = var.seal
    environment_vars = ["IMAGE_VERSION=${var.version}"]
  }
}
