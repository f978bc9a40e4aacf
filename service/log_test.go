package service

import (
	"bytes"
	"os"
	"strings"
	"testing"

	"github.com/sirupsen/logrus"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/config"
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

func TestJournalName(t *testing.T) {
	for name, want := range map[string]string{"pod": "POD", "service_account": "SERVICE_ACCOUNT", "_pid": "PID",
		"a.b-c": "A_B_C", "é1": "1"} {
		if got := journalName(name); got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
}
