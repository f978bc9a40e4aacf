package service

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/journal"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/config"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/messageid"
)

// configureLog sets level and format. The format auto is the journal's own protocol where stderr is
// the journal, text on a terminal, and JSON for whoever else reads it.
func configureLog(log *logrus.Logger, c config.Log, stderr io.Writer) {
	log.SetOutput(stderr)
	log.ReplaceHooks(make(logrus.LevelHooks))
	if level, err := logrus.ParseLevel(c.Level); err == nil { // config has checked it
		log.SetLevel(level)
	}
	switch format(c.Format, stderr) {
	case "journal":
		log.SetOutput(io.Discard)
		log.SetFormatter(discard{})
		log.AddHook(journalHook{})
	case "text":
		log.SetFormatter(&logrus.TextFormatter{DisableTimestamp: os.Getenv("INVOCATION_ID") != "", FullTimestamp: true})
	default:
		log.SetFormatter(&logrus.JSONFormatter{TimestampFormat: time.RFC3339Nano})
	}
}

// CommandLog is the log of a command that ends, such as `routing install`. It is the journal's
// where a unit runs it, else what the configuration says, and text for a person.
func CommandLog(c config.Log, stderr io.Writer) *logrus.Logger {
	log := logrus.New()
	if c.Format == "auto" || c.Format == "" {
		if c.Format = format(c.Format, stderr); c.Format == "json" {
			c.Format = "text"
		}
	}
	configureLog(log, c, stderr)
	return log
}

func format(configured string, stderr io.Writer) string {
	if configured != "" && configured != "auto" {
		return configured
	}
	if ok, err := journal.StderrIsJournalStream(); ok && err == nil {
		return "journal"
	}
	if f, ok := stderr.(*os.File); ok {
		if _, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS); err == nil {
			return "text"
		}
	}
	return "json"
}

// discard saves formatting what the journal gets by its own protocol.
type discard struct{}

func (discard) Format(*logrus.Entry) ([]byte, error) { return nil, nil }

// journalHook sends entries to the journal with their fields, so that `journalctl POD=ns/name`
// finds them.
type journalHook struct{}

func (journalHook) Levels() []logrus.Level { return logrus.AllLevels }

const identifier = "gke-metadata-emulator"

// LogHeld writes to the journal that a socket unit cannot listen. One entry is shown for the
// socket unit, which fails, and for the service, which then does not start. It returns false where
// stderr is not the journal. journald takes OBJECT_SYSTEMD_UNIT= from root, and may not find out
// the unit of a process that ends at once. The library for the journal can send a field only once.
func LogHeld(text, socketUnit string) bool {
	if ok, err := journal.StderrIsJournalStream(); !ok || err != nil {
		return false
	}
	c, err := new(net.Dialer).DialContext(context.Background(), "unixgram", "/run/systemd/journal/socket")
	if err != nil {
		return false
	}
	defer func() { _ = c.Close() }()
	_, err = fmt.Fprintf(c, "MESSAGE=%s\nPRIORITY=%d\nSYSLOG_IDENTIFIER=%s\n%s=%s\nOBJECT_SYSTEMD_UNIT=%s\n"+
		"OBJECT_SYSTEMD_UNIT=%s\n", text, journal.PriErr, identifier, messageid.Field, messageid.ListenHeld, socketUnit, unit)
	return err == nil
}

func (journalHook) Fire(e *logrus.Entry) error {
	text, fields := journalEntry(e)
	return journal.Send(text, priorities[e.Level], fields)
}

// journalEntry returns the message with the fields, and the fields.
func journalEntry(e *logrus.Entry) (text string, fields map[string]string) {
	fields = make(map[string]string, len(e.Data)+1)
	fields["SYSLOG_IDENTIFIER"] = identifier // for journalctl -t, as systemd sets it for what a unit prints
	var message strings.Builder              // the fields once more, for those who read only the message
	message.WriteString(e.Message)
	for _, k := range slices.Sorted(maps.Keys(e.Data)) {
		v := fmt.Sprint(e.Data[k])
		if fields[journalName(k)] = v; k == messageid.Field {
			continue // for those who search, not for those who read
		}
		fmt.Fprintf(&message, " %s=%q", k, v)
	}
	return message.String(), fields
}

var priorities = map[logrus.Level]journal.Priority{
	logrus.TraceLevel: journal.PriDebug, logrus.DebugLevel: journal.PriDebug, logrus.InfoLevel: journal.PriInfo,
	logrus.WarnLevel: journal.PriWarning, logrus.ErrorLevel: journal.PriErr, logrus.FatalLevel: journal.PriCrit,
	logrus.PanicLevel: journal.PriEmerg,
}

// journalName makes a field name of the journal's grammar: A-Z, 0-9 and _, not led by _.
func journalName(k string) string {
	return strings.TrimLeft(strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z':
			return r - 'a' + 'A'
		case r >= 'A' && r <= 'Z', r >= '0' && r <= '9':
			return r
		}
		return '_'
	}, k), "_")
}
