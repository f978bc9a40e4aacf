# Packer: installs the package on the machine that `source` makes or connects to.
#
#   packer build -var package=gke-metadata-emulator_1.0.0_amd64.deb -var host=192.0.2.7 packaging/recipes/node.pkr.hcl
#
# To make an image, replace the source null, which connects to an existing machine, by the source of your cloud
# (amazon-ebs, azure-arm, googlecompute, qemu, …).
variable "package" {
  type        = string
  description = "Path of the deb or rpm on this machine."
}

variable "kubelet" {
  type        = string
  default     = ""
  description = "The unit that waits until the rules are installed: kubelet.service, k3s.service, ... Empty: none."
}

variable "host" {
  type = string
}

variable "port" {
  type    = number
  default = 22
}

variable "user" {
  type    = string
  default = "root"
}

variable "key" {
  type        = string
  default     = "~/.ssh/id_ed25519"
  description = "Path of the user's private SSH key."
}

source "null" "node" {
  communicator         = "ssh"
  ssh_host             = var.host
  ssh_port             = var.port
  ssh_username         = var.user
  ssh_private_key_file = var.key
}

build {
  sources = ["source.null.node"]

  provisioner "file" {
    source      = var.package
    destination = "/tmp/${basename(var.package)}"
  }

  provisioner "file" {
    source      = "${path.root}/provision.sh"
    destination = "/tmp/provision.sh"
  }

  provisioner "shell" {
    inline = [
      "sudo KUBELET='${var.kubelet}' sh /tmp/provision.sh '/tmp/${basename(var.package)}'",
      "rm /tmp/provision.sh '/tmp/${basename(var.package)}'",
    ]
  }
}
