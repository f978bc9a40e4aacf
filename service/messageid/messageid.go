// Package messageid has the kinds of log lines that somebody alerts on or audits. Each has a
// MESSAGE_ID, by which `journalctl MESSAGE_ID=…` finds it whatever its text becomes, and an entry
// in the catalogue (systemd/catalog), which `journalctl -x` shows.
package messageid

import "github.com/sirupsen/logrus"

// Kind is a MESSAGE_ID: 128 bits in 32 lowercase hexadecimal digits. It never changes.
type Kind string

// The kinds. A request causes each of the first three; the others are of the node.
const (
	TokenIssued Kind = "1ac9107fcde2475d9fa0f0f50e801731"
	Refused     Kind = "7e8503d02454478b98dc836718a0e364"
	PassedOn    Kind = "2ff5be8e0f49437f8e28075f492101e9"

	Ready             Kind = "1b9c4187bbe24b40a0172fad18df2b45"
	ListenerSilent    Kind = "5fa3265f61214b1e918ee08aabfe96b0"
	ListenHeld        Kind = "434526578a0c4b6f9b0da7da32a7dc90"
	ConfigRefused     Kind = "7013973bc473401b9dd1549ffb9807ee"
	HelperAway        Kind = "82979ca8b04d45619d18709e478ddce1"
	APIAway           Kind = "ee9e8da5cef94fb7a36d472223371c38"
	GrantMissing      Kind = "2759e9472380427fb2989951db8196e3"
	RulesRepaired     Kind = "34dc6653a365475ca9a4127419a4246b"
	RulesNotInstalled Kind = "3d3280a1b5bc4337a994bb08e78f714e"
)

// Field is the journal's field.
const Field = "MESSAGE_ID"

// In returns log with the kind as a field of its next line.
func (k Kind) In(log logrus.FieldLogger) *logrus.Entry { return log.WithField(Field, string(k)) }
