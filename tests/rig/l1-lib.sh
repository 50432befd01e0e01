# shellcheck shell=dash
# What a scenario in L1 can call. Report lines are `CHECK <name> ok|FAIL <detail>`, one per check.

# check NAME COMMAND...: passes when the command succeeds; its output is the detail when it does not.
check() {
    check_name=$1
    shift
    if check_output=$("$@" 2>&1); then
        echo "CHECK $check_name ok"
    else
        check_status=$?
        echo "CHECK $check_name FAIL exit $check_status: $(echo "$check_output" | tr '\n\r' '  ' | tail -c 800)"
        return 1
    fi
}

# same NAME EXPECTED ACTUAL: passes when both are the same text.
same() {
    if [ "$2" = "$3" ]; then
        echo "CHECK $1 ok"
    else
        echo "CHECK $1 FAIL expected '$2', got '$(echo "$3" | tr '\n\r' '  ' | tail -c 800)'"
        return 1
    fi
}

# differ NAME A B: passes when both are there and are not the same text.
differ() {
    if [ -n "$2" ] && [ -n "$3" ] && [ "$2" != "$3" ]; then
        echo "CHECK $1 ok"
    else
        echo "CHECK $1 FAIL '$2' and '$3' should be there and differ"
        return 1
    fi
}

# between NAME LEAST MOST VALUE
between() {
    if [ "$4" -ge "$2" ] && [ "$4" -le "$3" ]; then
        echo "CHECK $1 ok"
    else
        echo "CHECK $1 FAIL expected $2 to $3, got '$(echo "$4" | tr '\n\r' '  ' | tail -c 800)'"
        return 1
    fi
}

# within SECONDS COMMAND...: waits until the command succeeds, false when the time is up.
within() {
    within_limit=$1
    shift
    within_start=$(cut -d. -f1 /proc/uptime)
    until "$@" >/dev/null 2>&1; do
        within_now=$(cut -d. -f1 /proc/uptime)
        [ $((within_now - within_start)) -lt "$within_limit" ] || return 1
        sleep 0.2
    done
}

# gone PID: true when the process is no more (or is a zombie that nobody has waited for).
gone() {
    [ ! -d "/proc/$1" ] || grep -q '^State:.*Z' "/proc/$1/status" 2>/dev/null
}
