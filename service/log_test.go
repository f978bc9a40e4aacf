package service

import (
	"bytes"
	"maps"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/sirupsen/logrus"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/config"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/messageid"
)

func TestLogFormat(t *testing.T) {
	for format, want := range map[string]string{
		"text": `level=info msg=hello pod=a/b`,
		"json": `"pod":"a/b"`,
		"auto": `"msg":"hello"`, // a buffer is no terminal
	} {
		var out bytes.Buffer
		log := logrus.New()
		configureLog(log, config.Log{Level: "info", Format: format}, &out)
		log.WithField("pod", "a/b").Info("hello")
		log.Debug("not at this level")
		if !strings.Contains(out.String(), want) || strings.Contains(out.String(), "not at") {
			t.Errorf("%s: %s", format, &out)
		}
		// A reload may ask for another one.
		out.Reset()
		configureLog(log, config.Log{Level: "debug", Format: "text"}, &out)
		log.Debug("now it is")
		if !strings.Contains(out.String(), "now it is") {
			t.Errorf("%s, after a reload: %s", format, &out)
		}
	}
	if terminal, err := os.Open("/dev/null"); err != nil {
		t.Fatal(err)
	} else if got := format("auto", terminal); got != "json" {
		t.Errorf("/dev/null: %s", got)
	}
}

// What a command such as `routing install` says is text for a person, unless the configuration asks
// for another format.
func TestCommandLog(t *testing.T) {
	for format, want := range map[string]string{"auto": "level=info msg=hello", "text": "level=info msg=hello",
		"json": `"msg":"hello"`} {
		var out bytes.Buffer
		CommandLog(config.Log{Level: "info", Format: format}, &out).Info("hello")
		if !strings.Contains(out.String(), want) {
			t.Errorf("%s: %s", format, &out)
		}
	}
}

// Each kind of line is in the catalogue and in the documents, and nothing else is.
func TestCatalogue(t *testing.T) {
	kinds := regexp.MustCompile(`Kind += "([0-9a-f]{32})"`).FindAllStringSubmatch(read(t, "messageid/messageid.go"), -1)
	catalogue, audit := read(t, "../systemd/catalog"), read(t, "../docs/audit.md")
	for _, k := range kinds {
		if !strings.Contains(catalogue, "\n-- "+k[1]+"\nSubject: ") {
			t.Errorf("%s is not in the catalogue", k[1])
		}
		if !strings.Contains(audit, "| `"+k[1]+"` |") {
			t.Errorf("%s is not in docs/audit.md", k[1])
		}
	}
	if entries := strings.Count(catalogue, "\n-- "); len(kinds) == 0 || entries != len(kinds) {
		t.Errorf("%d kinds, %d entries in the catalogue", len(kinds), entries)
	}
	for _, document := range regexp.MustCompile(`Documentation: file:///usr/share/doc/gke-metadata-emulator/(\S+)`).
		FindAllStringSubmatch(catalogue, -1) {
		read(t, "../"+document[1])
	}
}

// What is a field of the journal, and by which name journalctl -t finds the line.
func TestJournalFields(t *testing.T) {
	entry := messageid.TokenIssued.In(logrus.New()).WithField("service_account", "prod/uploader")
	entry.Message = "token issued"
	text, fields := journalEntry(entry)
	want := map[string]string{"SYSLOG_IDENTIFIER": "gke-metadata-emulator", "MESSAGE_ID": string(messageid.TokenIssued),
		"SERVICE_ACCOUNT": "prod/uploader"}
	if !maps.Equal(fields, want) || text != `token issued service_account="prod/uploader"` {
		t.Errorf("%s, %v", text, fields)
	}
}

func read(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestJournalName(t *testing.T) {
	for name, want := range map[string]string{"pod": "POD", "service_account": "SERVICE_ACCOUNT", "_pid": "PID",
		"a.b-c": "A_B_C", "é1": "1"} {
		if got := journalName(name); got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
}
