# Packer: bakes the package into the machine that `source` makes or reaches.
#
#   packer build -var package=gke-metadata-emulator_1.0.0_amd64.deb -var host=192.0.2.7 packaging/recipes/node.pkr.hcl
#
# To make an image, put the source of your cloud (amazon-ebs, azure-arm, googlecompute, qemu, …) in the place of null,
# which takes a machine that is there already.
variable "package" {
  type        = string
  description = "The deb or rpm, on this machine."
}

variable "kubelet" {
  type        = string
  default     = ""
  description = "The unit that waits until the rules stand: kubelet.service, k3s.service, ... Empty: none."
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
  description = "The user's private SSH key."
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
