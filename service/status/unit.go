package status

import "fmt"

// Unit is what systemd says of a unit; the zero Unit where systemd could not be asked.
type Unit struct {
	Active, Sub string // as `systemctl status` shows them: activating, auto-restart
	Result      string // of its last end: success, exit-code, timeout, …
	Code        int32  // exit status of its last main process
	Status      string // its STATUS=
	Restarts    uint32 // by systemd, since it was started
}

// String says how the unit is, and how it last ended; "" where systemd could not be asked.
func (u Unit) String() string {
	if u.Active == "" {
		return ""
	}
	text := fmt.Sprintf("systemd: %s (%s)", u.Active, u.Sub)
	if u.Result != "" && u.Result != "success" {
		text += fmt.Sprintf(", last result %s", u.Result)
	}
	if u.Code != 0 {
		text += fmt.Sprintf(", exit status %d", u.Code)
	}
	if u.Restarts > 0 {
		text += fmt.Sprintf(", %d restarts", u.Restarts)
	}
	if u.Status != "" {
		text += ", status: " + u.Status
	}
	return text
}
