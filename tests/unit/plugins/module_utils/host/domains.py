# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Domains as they are met: what `virsh dumpxml --inactive` prints for guests of several kinds and ages."""

from __future__ import annotations

UUID = "6f1c2f0e-1111-4222-8333-000000000001"

# virt-manager on Debian 12: q35, secure boot, an emulated TPM, the usual two USB redirections
DEBIAN = f"""<domain type='kvm'>
  <name>web</name>
  <uuid>{UUID}</uuid>
  <title>Web server</title>
  <description>Serves the shop.
Ask: ops@example.com, 100% theirs</description>
  <metadata>
    <libosinfo:libosinfo xmlns:libosinfo="http://libosinfo.org/xmlns/libvirt/domain/1.0">
      <libosinfo:os id="http://debian.org/debian/12"/>
    </libosinfo:libosinfo>
  </metadata>
  <memory unit='KiB'>4194304</memory>
  <currentMemory unit='KiB'>2097152</currentMemory>
  <vcpu placement='static'>4</vcpu>
  <os firmware='efi'>
    <type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
    <firmware>
      <feature enabled='yes' name='enrolled-keys'/>
      <feature enabled='yes' name='secure-boot'/>
    </firmware>
    <loader readonly='yes' secure='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.ms.fd</loader>
    <nvram template='/usr/share/OVMF/OVMF_VARS_4M.ms.fd'>/var/lib/libvirt/qemu/nvram/web_VARS.fd</nvram>
    <boot dev='hd'/>
  </os>
  <features><acpi/><apic/><vmport state='off'/><smm state='on'/></features>
  <cpu mode='host-passthrough' check='none' migratable='on'/>
  <clock offset='utc'><timer name='rtc' tickpolicy='catchup'/></clock>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' cache='none' discard='unmap'/>
      <source file='/var/lib/libvirt/images/web.qcow2'/>
      <target dev='vda' bus='virtio'/>
      <serial>web root/1</serial>
    </disk>
    <disk type='file' device='cdrom'>
      <driver name='qemu' type='raw'/>
      <source file='/srv/iso/debian-12.iso'/>
      <target dev='sda' bus='sata'/>
      <readonly/>
    </disk>
    <controller type='usb' index='0' model='qemu-xhci' ports='15'/>
    <controller type='pci' index='0' model='pcie-root'/>
    <interface type='bridge'>
      <mac address='52:54:00:6d:90:01'/>
      <source bridge='br0'/>
      <vlan><tag id='42'/></vlan>
      <model type='virtio'/>
    </interface>
    <interface type='network'>
      <mac address='52:54:00:6d:90:02'/>
      <source network='default'/>
      <model type='virtio'/>
      <link state='down'/>
    </interface>
    <serial type='pty'><target type='isa-serial' port='0'><model name='isa-serial'/></target></serial>
    <console type='pty'><target type='serial' port='0'/></console>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <channel type='spicevmc'><target type='virtio' name='com.redhat.spice.0'/></channel>
    <input type='tablet' bus='usb'/><input type='mouse' bus='ps2'/><input type='keyboard' bus='ps2'/>
    <tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>
    <graphics type='spice' autoport='yes'/>
    <sound model='ich9'/>
    <audio id='1' type='spice'/>
    <video><model type='virtio' heads='1' primary='yes'/></video>
    <redirdev bus='usb' type='spicevmc'/>
    <redirdev bus='usb' type='spicevmc'/>
    <watchdog model='itco' action='reset'/>
    <memballoon model='virtio'/>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
  </devices>
</domain>"""

# Windows Server on virtio-scsi, with topology, local time and Hyper-V's enlightenments
WINDOWS = f"""<domain type='kvm'>
  <name>DC_01 (prod)</name>
  <uuid>{UUID}</uuid>
  <genid>3e0b0f1e-2222-4333-8444-000000000002</genid>
  <metadata>
    <libosinfo:libosinfo xmlns:libosinfo="http://libosinfo.org/xmlns/libvirt/domain/1.0">
      <libosinfo:os id="http://microsoft.com/win/2k19"/>
    </libosinfo:libosinfo>
  </metadata>
  <memory unit='KiB'>8388608</memory>
  <currentMemory unit='KiB'>8388608</currentMemory>
  <vcpu placement='static' current='4'>8</vcpu>
  <os><type arch='x86_64' machine='pc-q35-rhel9.2.0'>hvm</type></os>
  <features><acpi/><apic/><hyperv mode='custom'><relaxed state='on'/></hyperv></features>
  <cpu mode='host-model' check='partial'><topology sockets='1' dies='1' cores='4' threads='2'/></cpu>
  <clock offset='localtime'/>
  <devices>
    <disk type='block' device='disk'>
      <driver name='qemu' type='raw' cache='none' io='native'/>
      <source dev='/dev/vg0/dc01'/>
      <target dev='sda' bus='scsi' rotation_rate='1'/>
      <wwn>5000c50015ea71aa</wwn>
      <boot order='2'/>
    </disk>
    <disk type='file' device='cdrom'><target dev='sdb' bus='sata'/><readonly/><boot order='1'/></disk>
    <controller type='scsi' index='0' model='virtio-scsi'/>
    <interface type='bridge'>
      <mac address='52:54:00:6d:90:03'/><source bridge='vmbr1'/><model type='e1000e'/><boot order='3'/>
    </interface>
    <graphics type='vnc' port='-1' passwd='secret'/>
    <video><model type='qxl' heads='2'/></video>
    <input type='tablet' bus='usb'/>
    <memballoon model='none'/>
  </devices>
</domain>"""

# A guest that has come along since the days of i440fx and ide
OLD = f"""<domain type='kvm'>
  <name>legacy</name>
  <uuid>{UUID}</uuid>
  <memory>524288</memory>
  <vcpu>1</vcpu>
  <os><type arch='i686' machine='pc-i440fx-2.1'>hvm</type><boot dev='cdrom'/><boot dev='hd'/><boot dev='network'/></os>
  <clock offset='utc'/>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw' cache='default'/><source file='/vm/legacy.img'/><target dev='hda' bus='ide'/>
    </disk>
    <disk type='file' device='cdrom'><target dev='hdc' bus='ide'/><readonly/></disk>
    <disk type='file' device='floppy'><source file='/vm/boot.flp'/><target dev='fda' bus='fdc'/></disk>
    <interface type='user'><mac address='52:54:00:6d:90:04'/></interface>
    <video><model type='cirrus'/></video>
    <sound model='sb16'/>
    <parallel type='pty'/>
  </devices>
</domain>"""

# Disks in Ceph, and much that belongs to its host
CEPH = f"""<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>db</name>
  <uuid>{UUID}</uuid>
  <memory unit='GiB'>2</memory>
  <vcpu>2</vcpu>
  <cputune><vcpupin vcpu='0' cpuset='1'/></cputune>
  <memoryBacking><hugepages/></memoryBacking>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <features><acpi/></features>
  <cpu mode='custom' match='exact'>
    <model fallback='forbid'>Skylake-Server-IBRS</model><feature policy='disable' name='hle'/>
    <feature policy='require' name='vmx'/>
  </cpu>
  <devices>
    <disk type='network' device='disk'>
      <driver name='qemu' type='raw'/>
      <auth username='libvirt'><secret type='ceph' uuid='{UUID}'/></auth>
      <source protocol='rbd' name='pool/db'><host name='mon1' port='6789'/><host name='mon2'/></source>
      <target dev='vda' bus='virtio'/>
    </disk>
    <disk type='volume' device='disk'><source pool='fast' volume='db-log'/><target dev='vdb' bus='virtio'/></disk>
    <disk type='nvme' device='disk'>
      <source type='pci' managed='yes' namespace='1'>
        <address domain='0x0000' bus='0x02' slot='0x00' function='0x0'/>
      </source>
      <target dev='vdc' bus='virtio'/>
    </disk>
    <interface type='hostdev' managed='yes'><mac address='52:54:00:6d:90:05'/></interface>
    <interface type='direct'>
      <mac address='52:54:00:6d:90:06'/><source dev='eth1' mode='bridge'/><model type='virtio'/>
      <driver queues='4'/><mtu size='9000'/>
    </interface>
    <hostdev mode='subsystem' type='pci' managed='yes'>
      <source><address domain='0x0000' bus='0x01' slot='0x00' function='0x0'/></source>
    </hostdev>
    <hostdev mode='subsystem' type='usb'>
      <source><vendor id='0x1050'/><product id='0x0407'/></source>
    </hostdev>
    <filesystem type='mount'><driver type='virtiofs'/><source dir='/srv/share'/><target dir='share'/></filesystem>
    <watchdog model='i6300esb' action='poweroff'/>
    <rng model='virtio'><rate bytes='2048' period='500'/><backend model='random'>/dev/random</backend></rng>
    <tpm model='tpm-tis'><backend type='passthrough'><device path='/dev/tpm0'/></backend></tpm>
    <vsock model='virtio'/>
    <video><model type='none'/></video>
    <serial type='pty'/>
  </devices>
  <qemu:commandline><qemu:arg value='-device'/></qemu:commandline>
</domain>"""


def make(devices: str = "", *, name: str = "m", before: str = "", os: str = "<type>hvm</type>") -> str:
    """A domain with nothing but what a test is about."""
    return (
        f"<domain type='kvm'><name>{name}</name><uuid>{UUID}</uuid><memory>1048576</memory><os>{os}</os>{before}"
        f"<devices>{devices}</devices></domain>"
    )


def disk(target: str, bus: str, inside: str = "", *, device: str = "disk") -> str:
    return (
        f"<disk type='file' device='{device}'><driver type='raw'/><source file='/vm/{target}.img'/>"
        f"<target dev='{target}' bus='{bus}'/>{inside}</disk>"
    )
