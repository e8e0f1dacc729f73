package monitoring

import (
	"fmt"
	"html"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// pictured are the panels of docs/pictures/dashboard.svg.
var pictured = []string{
	"Requests by method", "Failed requests by code", "Values encrypted by outcome", "Values decrypted by outcome",
	"KMS calls by class", "Stored values by state", "Key revoked, recovery keys in use", "Added latency",
}

const (
	width, height = 480, 240 // of a panel
	left, top     = 52, 34   // margins of its plot
	right, bottom = 12, 70
	columns       = 2
	linesOfLegend = 4
)

// units are what the titles of panels say about their axes.
var units = map[string]string{"reqps": ", per second", "ops": ", per second", "s": ", seconds"}

var colors = []string{"#3274d9", "#e02f44", "#56a64b", "#ff780a", "#8f3bb8", "#f2cc0c", "#1f9e8f", "#a0522d"}

// draw renders panels of the dashboard from a range of the data, as Grafana would.
func draw(t *testing.T, p prometheus, path string, from, to time.Time) {
	t.Helper()
	var out strings.Builder
	rows := (len(pictured) + columns - 1) / columns
	fmt.Fprintf(&out, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="11">`+"\n", columns*width, rows*height)
	fmt.Fprintf(&out, `<rect width="100%%" height="100%%" fill="#fff"/>`+"\n")
	for i, title := range pictured {
		at := slices.IndexFunc(dashboard(t), func(c panel) bool { return c.Title == title })
		if at < 0 {
			t.Fatalf("the dashboard has no panel %q", title)
		}
		fmt.Fprintf(&out, `<g transform="translate(%d,%d)">`+"\n", i%columns*width, i/columns*height)
		drawPanel(&out, p, dashboard(t)[at], from, to)
		fmt.Fprintln(&out, "</g>")
	}
	fmt.Fprintln(&out, "</svg>")
	if err := os.WriteFile(path, []byte(out.String()), 0o644); err != nil {
		t.Fatal(err)
	}
}

type curve struct {
	legend string
	at, v  []float64
}

func drawPanel(out *strings.Builder, p prometheus, c panel, from, to time.Time) {
	var curves []curve
	limit := 0.0
	for _, target := range c.Targets {
		for _, s := range p.series(expand(target.Expr), from, to) {
			line := curve{legend: legend(target.LegendFormat, s.Metric)}
			for _, pair := range s.Values {
				at, _ := pair[0].(float64)
				text, _ := pair[1].(string)
				if v, err := strconv.ParseFloat(text, 64); err == nil && v == v {
					line.at, line.v = append(line.at, at-float64(from.UnixMilli())/1000), append(line.v, v)
					limit = max(limit, v)
				}
			}
			curves = append(curves, line)
		}
	}
	if limit == 0 {
		limit = 1
	}
	seconds := to.Sub(from).Seconds()
	x := func(at float64) float64 { return left + at/seconds*(width-left-right) }
	y := func(v float64) float64 { return height - bottom - v/limit*(height-top-bottom) }
	fmt.Fprintf(out, `<text x="%d" y="20" font-size="13" font-weight="bold">%s</text>`+"\n", left, html.EscapeString(c.Title+units[c.FieldConfig.Defaults.Unit]))
	for i := range 3 {
		v := limit * float64(i) / 2
		fmt.Fprintf(out, `<line x1="%d" x2="%d" y1="%.1f" y2="%.1f" stroke="#ddd"/><text x="%d" y="%.1f" text-anchor="end" fill="#555">%s</text>`+"\n",
			left, width-right, y(v), y(v), left-5, y(v)+4, strconv.FormatFloat(v, 'g', 2, 64))
	}
	fmt.Fprintf(out, `<text x="%d" y="%d" fill="#555">0 s</text><text x="%d" y="%d" text-anchor="end" fill="#555">%.0f s</text>`+"\n",
		left, height-bottom+14, width-right, height-bottom+14, seconds)
	for i, line := range curves {
		color := colors[i%len(colors)]
		var points strings.Builder
		for j, at := range line.at {
			if j > 0 && at-line.at[j-1] > 1.5 { // a gap in the data
				fmt.Fprintf(out, `<polyline points="%s" fill="none" stroke="%s" stroke-width="1.5"/>`+"\n", points.String(), color)
				points.Reset()
			}
			fmt.Fprintf(&points, "%.1f,%.1f ", x(at), y(line.v[j]))
		}
		fmt.Fprintf(out, `<polyline points="%s" fill="none" stroke="%s" stroke-width="1.5"/>`+"\n", points.String(), color)
		if i < 2*linesOfLegend {
			fmt.Fprintf(out, `<text x="%d" y="%d" fill="%s">%s</text>`+"\n", left+i%2*210, height-bottom+28+i/2*12, color, html.EscapeString(line.legend))
		}
	}
}

// legend fills Grafana's template.
func legend(format string, labels map[string]string) string {
	for name, value := range labels {
		format = strings.ReplaceAll(format, "{{"+name+"}}", value)
	}
	return format
}
